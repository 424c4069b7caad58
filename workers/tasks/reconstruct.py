"""Reconstruct: learn the rounding of one unit.

params
    unit, layers, attentions: see `orchestrator.planning.formats`; seed; cache_bytes; forward_batch_size; the
    reconstruct pass: inputs ("fp" or "quantized"), start, iterations, ...
inputs
    model: tree; calibration: shards; state: what `round` gave for the unit; earlier: states of the units before it, if
    inputs are quantized; temporal: what `temporal` gave, if the unit has layers of that block inside or its inputs are
    quantized
outputs
    state: see `quant_core.fit.unit_state`
metrics
    unit; sqnr_db_before, sqnr_db_after: of the unit's output, on calibration samples
"""

from __future__ import annotations

from typing import Any

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.reconstruction import ReconstructionConfig, reconstruct_unit
from quant_core.fit.unit_state import UnitState
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, local_files, only

_PASS = (
    "iterations",
    "batch_size",
    "lr",
    "trust",
    "learn_activation_scales",
    "activation_lr",
    "rounding_weight",
    "warmup",
    "cache_bytes",
    "forward_batch_size",
    "seed",
)


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Reconstruct one unit."""
    model = fetch_model(inputs, context).model.to(context.device)
    calibration = CalibrationSet(local_files(inputs["calibration"], context))
    start = UnitState.from_bytes(context.store.get_bytes(only(inputs, "state")))
    earlier = [UnitState.from_bytes(context.store.get_bytes(digest)) for digest in inputs.get("earlier", [])]
    temporal = UnitState.from_bytes(context.store.get_bytes(only(inputs, "temporal"))) if "temporal" in inputs else None
    result = reconstruct_unit(model, calibration, start, earlier, _config(params), context.scratch, temporal)
    metrics = {
        "unit": params["unit"],
        "sqnr_db_before": round(result.sqnr_db_before, 4),
        "sqnr_db_after": round(result.sqnr_db_after, 4),
    }
    return TaskOutput({"state": context.store.put_bytes(result.state.to_bytes())}, metrics)


def _config(params: dict[str, Any]) -> ReconstructionConfig:
    chosen = {name: params[name] for name in _PASS if name in params}
    return ReconstructionConfig(
        use_quantized_inputs=params["inputs"] == "quantized",
        start_nearest=params["start"] == "nearest",
        beta=tuple(params["beta"]),
        **chosen,
    )
