"""Warm starts: a model whose architecture was searched before starts from the front that was found there."""

from __future__ import annotations

import hashlib

from orchestrator.db.rows import ModelRow, SearchModelRow, SearchRow
from orchestrator.db.searches import (
    earlier_parent,
    find_parents,
    find_search,
    search_models,
    search_points,
    tables_read,
)
from orchestrator.db.session import Session
from orchestrator.planning.model import ModelInfo
from orchestrator.search.proposals import Proposed
from orchestrator.search.proposing import same_table
from quant_spec.allocation import Allocation
from quant_spec.keys import canonical_json
from quant_spec.search import SearchSpec

#: What a point has as its origin that comes from a parent's front.
WARM = "warm"


def shape_digest(model: ModelRow) -> str:
    """Name a model's architecture: the names and shapes of its layers, its attentions, and the shape of its samples."""
    info = ModelInfo.read(model.digest, model.inspection)
    layers = [[layer.name, layer.type, list(layer.shape)] for layer in info.layers]
    attentions = [name for unit in info.units for name in unit.attentions]
    shape = {"layers": layers, "attentions": attentions, "sample": list(info.sample_shape), "class": model.class_name}
    return hashlib.sha256(canonical_json(shape).encode()).hexdigest()


def find_parent(
    session: Session, search: SearchRow, spec: SearchSpec, model: SearchModelRow
) -> tuple[str | None, str | None]:
    """Return the search and the model whose front a model starts from; (None, None) if there is none.

    What is asked for again starts from where it started; else an earlier model of the same search comes first, then
    what was searched last.
    """
    if spec.warm_start is False:
        return None, None
    earlier = earlier_parent(session, search.digest, model.name)
    if earlier is not None and earlier[0] is not None and earlier[0] != search.id:
        before = find_parents(session, model.shape_digest, but_model=model.digest, but_digest="", search=earlier[0])
        if earlier in before:
            return earlier
    if spec.warm_start is True:
        own = [
            each for each in search_models(session, search.id)
            if each.shape_digest == model.shape_digest and each.stage == "done" and each.digest != model.digest
        ]  # fmt: skip
        if own:
            return search.id, own[0].name
        if earlier is not None:
            return None, None
    wanted = spec.warm_start if isinstance(spec.warm_start, str) else None
    found = find_parents(session, model.shape_digest, but_model=model.digest, but_digest=search.digest, search=wanted)
    return found[0] if found else (None, None)


def parent_tables(
    session: Session, search: SearchRow, parent: str | None, parent_model: str | None
) -> dict[str, list[str]] | None:
    """Return a parent's tables of sensitivities, by variant, if that search had the same choices; else None."""
    if parent is None or parent_model is None:
        return None
    other = find_search(session, parent)
    if not same_table({"spec": search.spec, "recipes": search.recipes}, {"spec": other.spec, "recipes": other.recipes}):
        return None
    return tables_read(session, parent, parent_model)


def warm_points(session: Session, parent: str, parent_model: str, most: int) -> list[Proposed]:
    """Return the front that a parent was left with, as candidates."""
    points = [
        point
        for point in search_points(session, parent, parent_model)
        if point.metrics is not None and point.dropped is None and point.allocation["layers"]
    ]
    points.sort(key=lambda point: int((point.metrics or {})["bytes"]))
    return [
        Proposed(Allocation.model_validate_json(canonical_json(point.allocation)), WARM, None, point.predicted)
        for point in points[:most]
    ]
