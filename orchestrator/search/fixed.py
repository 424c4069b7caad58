"""Which layers of a model a space leaves alone."""

from __future__ import annotations

import fnmatch

from orchestrator.errors import SearchError
from orchestrator.planning.model import ModelInfo
from quant_spec.messages import nearest
from quant_spec.search import Space


def fixed_layers(model: ModelInfo, space: Space) -> tuple[str, ...]:
    """Return the names of layers and attentions that stay as the base recipe says.

    Raises
    ------
    SearchError
        If a pattern matches none, or nothing is left to choose for.
    """
    names = [layer.name for layer in model.layers] + [name for unit in model.units for name in unit.attentions]
    ends = {"@first": model.first_layer, "@last": model.last_layer}
    found: set[str] = set()
    for place, pattern in enumerate(space.fixed):
        matched = [ends[pattern]] if pattern in ends else fnmatch.filter(names, pattern)
        if not matched:
            raise SearchError(
                f"space.fixed.{place}: got {pattern!r}, wanted a pattern that matches a layer of the model"
                f"{nearest(pattern, names[:1000])}"
            )
        found.update(matched)
    if found.issuperset(layer.name for layer in model.layers):
        raise SearchError("space.fixed: got patterns that fix every layer, wanted at least one to choose bits for")
    return tuple(name for name in names if name in found)
