"""Stands in for the tasks that propose points."""

from __future__ import annotations

import random
from collections.abc import Mapping

from orchestrator.db.rows import ModelRow
from orchestrator.planning.model import ModelInfo
from orchestrator.search.fixed import fixed_layers
from orchestrator.search.proposals import Proposals, Proposed
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.recipe import Recipe
from quant_spec.search import SearchSpec


def trivial_proposals(row: ModelRow, spec: SearchSpec, recipes: Mapping[str, Recipe], number: int) -> Proposals:
    """Return random mixtures."""
    model = ModelInfo.read(row.digest, row.inspection)
    fixed = set(fixed_layers(model, spec.space))
    layers = [layer.name for layer in model.layers if layer.name not in fixed]
    points = []
    draw = random.Random(f"{spec.seed}/{number}")
    for place in range(spec.effort.candidates):
        mean = place / max(spec.effort.candidates - 1, 1)
        widths = spec.space.weight_bits
        weights = [0.1 + (1 - abs(index / max(len(widths) - 1, 1) - mean)) ** 8 for index in range(len(widths))]
        choices = {name: LayerChoice(weight_bits=draw.choices(widths, weights)[0]) for name in layers}
        points.append(Proposed(Allocation(layers=choices), "front", None, None))
    return Proposals(tuple(points), [], {}, ())
