"""Step bits: choose the activation bits of each trajectory step from their measured effects.

params
    method, target_mean, threshold, least_last: see `quant_core.methods.ptqd.step_bits.StepBitsConfig`
inputs
    effects: shards
outputs
    step_bits: JSON {"bits": one for each step, "timesteps"}
metrics
    bits; mean
"""

from __future__ import annotations

from quant_core.methods.ptqd.step_bits import StepBitsConfig, choose_step_bits
from quant_core.methods.ptqd.step_effects import StepEffects, merge_effects
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import to_json


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Choose the bits of all steps."""
    effects = merge_effects([StepEffects.from_bytes(context.store.get_bytes(item)) for item in inputs["effects"]])
    config = StepBitsConfig(
        params["method"], params.get("target_mean"), params.get("threshold"), params.get("least_last")
    )
    bits = list(choose_step_bits(effects, config))
    table = {"bits": bits, "timesteps": list(effects.timesteps)}
    metrics = {"bits": bits, "mean": round(sum(bits) / len(bits), 6)}
    return TaskOutput({"step_bits": context.store.put_bytes(to_json(table))}, metrics)
