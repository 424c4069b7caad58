"""Trials: what quantizing each part of a group of units alone does to the final samples.

The format of the damages is that of `quant_spec.tasks.trials`.
"""

from __future__ import annotations

from quant_core.fit.trials import try_parts
from quant_spec.tasks.trials import DAMAGES, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import EncodedHere, fetch_model, find_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Try the parts of one group."""
    denoiser = fetch_model(inputs.model, context)
    denoiser.model.to(context.device)
    found = try_parts(
        find_trajectories(denoiser, params.sampler, EncodedHere(inputs.prompts), params.part, context),
        read_states(inputs.states, context),
        params.seeds.range,
        batch_size=params.batch_size,
        weights=params.weights,
    )
    return TaskOutput({DAMAGES: context.store.put_bytes(found.to_bytes())})
