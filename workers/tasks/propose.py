"""Propose: allocations worth measuring, from tables of sensitivities and from what was measured so far.

The format of the proposals is that of `quant_spec.tasks.propose`. Metrics: `points`, `infeasible`, how many of each.
"""

from __future__ import annotations

from typing import Any

from quant_core.search.proposals import propose
from quant_spec.documents import read_json
from quant_spec.errors import InvalidInputError
from quant_spec.keys import canonical_json
from quant_spec.sensitivity_table import merge_tables
from quant_spec.tasks.propose import PROPOSALS, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Propose for one model."""
    if len(inputs.tables) != len(params.variants):
        raise InvalidInputError(
            f"variants: got {len(params.variants)}, wanted one for each of {len(inputs.tables)} tables"
        )
    groups: dict[str, list[dict[str, Any]]] = {}
    for variant, digest in zip(params.variants, inputs.tables, strict=True):
        groups.setdefault(variant, []).append(read_json(context.store.get_bytes(digest), "table"))
    found = propose({variant: merge_tables(tables) for variant, tables in groups.items()}, params)
    metrics = {"points": len(found["points"]), "infeasible": len(found["infeasible"])}
    return TaskOutput({PROPOSALS: context.store.put_bytes(canonical_json(found).encode())}, metrics)
