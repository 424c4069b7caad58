"""Inspect: what the planner must know of a model.

inputs
    model: tree
outputs
    inspection: JSON, see `quant_core.inspect.inspection`
metrics
    inspection: the same
"""

from __future__ import annotations

from quant_core.inspect.inspection import inspect_model
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.tasks.common import fetch_model, to_json


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Describe the model of the input `model`."""
    inspection = inspect_model(fetch_model(inputs, context))
    return TaskOutput({"inspection": context.store.put_bytes(to_json(inspection))}, {"inspection": inspection})
