"""Step bits: choose the activation bits of each trajectory step from their measured effects.

The choice is JSON, {"bits": one for each step, "timesteps"}. Metrics: `bits`, and their `mean`.
"""

from __future__ import annotations

from quant_core.methods.ptqd.step_bits import choose_step_bits
from quant_core.methods.ptqd.step_effects import StepEffects, merge_effects
from quant_spec.keys import canonical_json
from quant_spec.tasks.step_bits import STEP_BITS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose the bits of all steps."""
    effects = merge_effects([StepEffects.from_bytes(context.store.get_bytes(digest)) for digest in inputs.effects])
    bits = list(choose_step_bits(effects, params))
    table = {"bits": bits, "timesteps": list(effects.timesteps)}
    metrics = {"bits": bits, "mean": round(sum(bits) / len(bits), 6)}
    return TaskOutput({STEP_BITS: context.store.put_bytes(canonical_json(table).encode())}, metrics)
