"""Step effects: what activation bits at one trajectory step do to the final samples of a shard of seeds.

params
    sampler: see `SamplerSpec`; seeds: {"first", "count"}; batch_size: seeds per denoiser call; choices: bits; layers: {
    name of a layer that they are chosen for: {"symmetric", "range", "split"}}; seed
inputs
    model: tree; calibration: shards that ranges are measured on
outputs
    effects: see `quant_core.methods.ptqd.step_effects.StepEffects`
"""

from __future__ import annotations

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.sampler import SamplerSpec
from quant_core.methods.ptqd.step_effects import VariedLayer, measure_effects
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, local_files, seed_range


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Measure one shard."""
    effects = measure_effects(
        fetch_model(inputs, context),
        CalibrationSet(local_files(inputs["calibration"], context)),
        {name: VariedLayer.from_json(layer) for name, layer in params["layers"].items()},
        params["choices"],
        SamplerSpec.from_json(params["sampler"]),
        seed_range(params["seeds"]),
        batch_size=params["batch_size"],
        seed=params["seed"],
        device=context.device,
    )
    return TaskOutput({"effects": context.store.put_bytes(effects.to_bytes())})
