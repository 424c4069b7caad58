"""Round: quantize a group of units without gradients.

params
    units: formats and ranges of each unit, see `orchestrator.planning.formats`; seed; forward_batch_size; the round
    pass: method, and for closed_form samples, positions, damping
inputs
    model: tree; calibration: shards; step_bits: what `step_bits` chose, if activation bits in the formats are null;
    factors: what `scale` chose for each unit, if channels are scaled; allocation: what `allocate` chose, if layers are
    marked as allocated
outputs
    state:<unit> for each unit, see `quant_core.fit.unit_state`
metrics
    layers: {layer: {"sqnr_db": of its output, or of its weight if rounded to nearest}}
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load
from torch import Tensor

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.channel_factors import ChannelFactors
from quant_core.fit.rounding import RoundingConfig, read_unit, round_units
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import chosen_step_bits, fetch_model, local_files, only


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Round one group of units."""
    model = fetch_model(inputs, context).model.to(context.device)
    calibration = CalibrationSet(local_files(inputs["calibration"], context))
    bits = chosen_step_bits(inputs, context)
    units = [read_unit(unit, bits) for unit in params["units"]]
    factors = ChannelFactors.from_bytes([context.store.get_bytes(digest) for digest in inputs.get("factors", [])])
    channels = (factors.scales, factors.shifts, _allocation(inputs, context))
    rounded = round_units(model, calibration, units, _config(params), *channels)
    outputs = {f"state:{each.state.formats.unit}": context.store.put_bytes(each.state.to_bytes()) for each in rounded}
    layers = {name: {"sqnr_db": round(db, 4)} for each in rounded for name, db in each.layer_sqnr_db.items()}
    return TaskOutput(outputs, {"layers": layers})


def _allocation(inputs: Inputs, context: TaskContext) -> dict[str, Tensor] | None:
    """Read the bits of output channels, if they were chosen."""
    return load(context.store.get_bytes(only(inputs, "allocation"))) if "allocation" in inputs else None


def _config(params: dict[str, Any]) -> RoundingConfig:
    chosen = {name: params[name] for name in ("method", "samples", "positions", "damping") if name in params}
    return RoundingConfig(batch_size=params["forward_batch_size"], seed=params["seed"], **chosen)
