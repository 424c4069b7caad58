"""Inspect: what the planner must know of a model, as JSON; see `quant_core.inspect.inspection`.

Metrics: `inspection`, the same.
"""

from __future__ import annotations

from quant_core.inspect.inspection import inspect_model
from quant_spec.keys import canonical_json
from quant_spec.tasks.inspect import INSPECTION, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import fetch_model


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Describe the model."""
    inspection = inspect_model(fetch_model(inputs.model, context, streamed=None))
    output = context.store.put_bytes(canonical_json(inspection).encode())
    return TaskOutput({INSPECTION: output}, {"inspection": inspection})
