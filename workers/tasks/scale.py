"""Scale: choose what the input channels of a group of units' layers are divided by, and their power-of-two steps.

params
    units: formats and ranges of each unit, see `orchestrator.planning.formats`; seed; forward_batch_size; rounding and,
    for closed_form, damping: how weights will be rounded; the scale pass: method, shift, and what these need
inputs
    model: tree; calibration: shards; step_bits: what `step_bits` chose, if activation bits in the formats are null
outputs
    factors:<unit> for each unit, see `quant_core.fit.channel_factors`
metrics
    layers: {layer: {"gain_db", "least", "greatest", "shifted"}}, see `quant_core.methods.dmq.scaling.ScaleReport`
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.rounding import read_unit
from quant_core.methods.dmq.scaling import ScaleConfig, fit
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import chosen_step_bits, fetch_model, local_files

_PASS = (
    "method",
    "exponent",
    "iterations",
    "lr",
    "weighting",
    "alpha",
    "xi",
    "half_life",
    "samples",
    "positions",
    "shift",
    "consensus",
    "least_spread",
    "held_out",
    "rounding",
    "damping",
    "seed",
)


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Choose the factors of one group of units."""
    model = fetch_model(inputs, context).model.to(context.device)
    calibration = CalibrationSet(local_files(inputs["calibration"], context))
    bits = chosen_step_bits(inputs, context)
    units = [read_unit(unit, bits) for unit in params["units"]]
    factors, reports = fit(model, calibration, units, _config(params))
    outputs = {
        f"factors:{formats.unit}": context.store.put_bytes(factors.of(list(formats.layers)).to_bytes())
        for formats, _ in units
    }
    layers = {name: {key: round(value, 4) for key, value in asdict(report).items()} for name, report in reports.items()}
    return TaskOutput(outputs, {"layers": layers})


def _config(params: dict[str, Any]) -> ScaleConfig:
    chosen = {name: params[name] for name in _PASS if name in params}
    return ScaleConfig(batch_size=params["forward_batch_size"], **chosen)
