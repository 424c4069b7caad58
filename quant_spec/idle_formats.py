"""Fields of formats that nothing reads beside a recipe's others: of weights, inputs, attention and exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from quant_spec.enums import ActivationMode, Granularity, NumberType, RangeMethod
from quant_spec.recipe import Recipe
from quant_spec.record import Record


@dataclass(frozen=True, slots=True)
class IdleField:
    """A field that cannot matter: the path of its record ("layers.0.weights."), the record, its name, what it needs."""

    path: str
    record: Record
    name: str
    needed: str


def idle_formats(recipe: Recipe) -> Iterator[IdleField]:
    """Yield the fields of `weights`, `activations`, `attention` and `layers` that cannot matter.

    What a field needs may stand in any of the exceptions, as a field of all layers is read in those alone too. Fields
    of exceptions are yielded only if they are stated.
    """
    for path, record in _sections(recipe):
        section = path.removesuffix(".").rpartition(".")[2]
        for name in type(record).model_fields:
            if "layers." in path and name not in record.model_fields_set:
                continue
            needed = _unmet(recipe, section, name)
            if needed:
                yield IdleField(path, record, name, needed)


def _sections(recipe: Recipe) -> Iterator[tuple[str, Record]]:
    yield from (("weights.", recipe.weights), ("activations.", recipe.activations), ("attention.", recipe.attention))
    for place, entry in enumerate(recipe.layers):
        yield from ((f"layers.{place}.weights.", entry.weights), (f"layers.{place}.activations.", entry.activations))


def _unmet(recipe: Recipe, section: str, name: str) -> str:
    """Return what a field of a section needs and the recipe does not have; nothing if it has all."""
    inputs = recipe.activations.bits is not None
    if not inputs and section == "attention":
        return "activations.bits"
    if not inputs and section == "activations" and name not in ("bits", "unknown_timestep"):
        return "activations.bits"
    if section == "attention" and name != "enabled" and not recipe.attention.enabled:
        return "attention.enabled true"
    for fields, needed, is_met in _NEEDS.get(section, ()):
        if name in fields and not is_met(recipe):
            return needed
    return ""


def _values(recipe: Recipe, section: str, name: str) -> set[Any]:
    """Return the values of a field, in its section and in the exceptions that state it."""
    partials = [getattr(entry, section) for entry in recipe.layers]
    stated = {getattr(partial, name) for partial in partials if name in partial.model_fields_set}
    return {getattr(getattr(recipe, section), name), *stated}


def _has(section: str, name: str, *wanted: Any) -> Callable[[Recipe], bool]:
    return lambda recipe: bool(_values(recipe, section, name) & set(wanted))


def _keeps_steps_apart(recipe: Recipe) -> bool:
    per_step = recipe.activations.bits is not None and _has("activations", "mode", ActivationMode.PER_STEP)(recipe)
    return per_step or recipe.passes.temporal is not None


_RECORDED = (ActivationMode.STATIC, ActivationMode.PER_STEP)

#: section -> (fields, what they need, whether a recipe has that)
_NEEDS: dict[str, tuple[tuple[frozenset[str], str, Callable[[Recipe], bool]], ...]] = {
    "weights": (
        (frozenset({"percentile"}), "weights.range percentile", _has("weights", "range", RangeMethod.PERCENTILE)),
        (
            frozenset({"group_size", "group_scale"}),
            "weights.granularity per_group",
            _has("weights", "granularity", Granularity.PER_GROUP),
        ),
        (frozenset({"symmetric"}), "weights.type int", _has("weights", "type", NumberType.INT)),
    ),
    "activations": (
        (
            frozenset({"range", "percentile"}),
            "activations.mode static or per_step",
            _has("activations", "mode", *_RECORDED),
        ),
        (
            frozenset({"percentile"}),
            "activations.range percentile",
            _has("activations", "range", RangeMethod.PERCENTILE),
        ),
        (frozenset({"symmetric"}), "activations.type int", _has("activations", "type", NumberType.INT)),
        (
            frozenset({"unknown_timestep"}),
            "activations.mode per_step or passes.temporal",
            _keeps_steps_apart,
        ),
    ),
}
