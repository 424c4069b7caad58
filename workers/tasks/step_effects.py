"""Step effects: what activation bits at one trajectory step do to the final samples of a shard of seeds.

The format is that of `quant_core.methods.ptqd.step_effects.StepEffects`.
"""

from __future__ import annotations

from quant_core.methods.ptqd.step_effects import measure_effects
from quant_spec.tasks.step_effects import EFFECTS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import EncodedHere, fetch_model, find_trajectories, open_trajectories


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure one shard."""
    denoiser = fetch_model(inputs.model, context)
    denoiser.model.to(context.device)
    effects = measure_effects(
        find_trajectories(denoiser, params.sampler, EncodedHere(inputs.prompts), params.part, context),
        open_trajectories(inputs.calibration, context),
        params.layers,
        params.choices,
        params.seeds.range,
        batch_size=params.batch_size,
        seed=params.seed,
    )
    return TaskOutput({EFFECTS: context.store.put_bytes(effects.to_bytes())})
