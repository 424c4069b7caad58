"""Temporal: quantize the temporal information block, over the sampler's finite set of timesteps.

params
    unit, layers, attentions: see `orchestrator.planning.formats`; the temporal pass: method, damping, cache, and for
    reconstruct iterations, lr, ...; for a cache, cache_ratio
inputs
    model: tree; calibration: shards
outputs
    state: see `quant_core.fit.unit_state`
metrics
    rows, features, table_bytes, replaced_bytes, unserved: see `quant_core.methods.tfmq.temporal_block.TemporalReport`
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.rounding import read_unit
from quant_core.methods.tfmq.temporal_block import TemporalConfig, fit
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, local_files

_PASS = ("damping", "iterations", "lr", "trust", "rounding_weight", "warmup", "cache", "cache_ratio")


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Quantize the temporal information block."""
    model = fetch_model(inputs, context).model.to(context.device)
    calibration = CalibrationSet(local_files(inputs["calibration"], context))
    formats, ranges = read_unit(params)
    state, report = fit(model, calibration, formats, ranges, _config(params))
    return TaskOutput({"state": context.store.put_bytes(state.to_bytes())}, asdict(report))


def _config(params: dict[str, Any]) -> TemporalConfig:
    chosen = {name: params[name] for name in _PASS if name in params}
    if "beta" in params:
        chosen["beta"] = tuple(params["beta"])
    return TemporalConfig(rounding=params["method"], **chosen)
