"""Step gains: what an error of the prediction at each trajectory step does to the final sample.

The gains are JSON, see `quant_core.fit.step_gains.StepGains`. Metrics: `gains`, by step; `coherence`.
"""

from __future__ import annotations

from quant_core.fit.step_gains import measure_gains
from quant_spec.tasks.step_gains import GAINS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import EncodedHere, fetch_model, find_trajectories, read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure the gains."""
    denoiser = fetch_model(inputs.model, context)
    denoiser.model.to(context.device)
    found = measure_gains(
        find_trajectories(denoiser, params.sampler, EncodedHere(inputs.prompts), params.part, context),
        read_states(inputs.states, context),
        params.seeds.range,
        batch_size=params.batch_size,
    )
    metrics = {"gains": [float(f"{gain:.4g}") for gain in found.gains], "coherence": round(found.coherence, 4)}
    return TaskOutput({GAINS: context.store.put_bytes(found.to_bytes())}, metrics)
