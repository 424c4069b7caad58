"""Channel errors: what the bits of output channels do, for the layers of a group of units.

params
    units: formats and ranges of each unit, see `orchestrator.planning.formats`; layers: names of those to measure;
    seed; forward_batch_size; samples, positions: see `quant_core.methods.mpqdm.channel_errors.MeasureConfig`
inputs
    model: tree; calibration: shards; factors: what `scale` chose for each unit, if channels are scaled
outputs
    errors: see `quant_core.methods.mpqdm.channel_errors`
metrics
    effects: {layer: error power at the prediction per error power at its output}
"""

from __future__ import annotations

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.channel_factors import ChannelFactors
from quant_core.fit.rounding import read_unit
from quant_core.methods.mpqdm.channel_errors import MeasureConfig, measure_units, to_bytes
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, local_files


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Measure one group of units."""
    model = fetch_model(inputs, context).model.to(context.device)
    calibration = CalibrationSet(local_files(inputs["calibration"], context))
    units = [read_unit(unit) for unit in params["units"]]
    config = MeasureConfig(params["samples"], params["positions"], params["forward_batch_size"], params["seed"])
    factors = ChannelFactors.from_bytes([context.store.get_bytes(digest) for digest in inputs.get("factors", [])])
    found = measure_units(model, calibration, units, params["layers"], config, factors)
    effects = {name: float(f"{layer.effect:.4g}") for name, layer in found.items()}
    return TaskOutput({"errors": context.store.put_bytes(to_bytes(found))}, {"effects": effects})
