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
    for path, section, record, names in _records(recipe):
        for fields, needed, is_met in _NEEDS[section]:
            for name in names:
                if name in fields and not is_met(recipe):
                    yield IdleField(path, record, name, needed)


def _records(recipe: Recipe) -> Iterator[tuple[str, str, Record, list[str]]]:
    """Yield the path, section and fields of each record of a format; of an exception, those that are stated."""
    for section in _NEEDS:
        record: Record = getattr(recipe, section)
        yield f"{section}.", section, record, list(type(record).model_fields)
    for place, entry in enumerate(recipe.layers):
        for section in ("weights", "activations"):
            record = getattr(entry, section)
            names = [name for name in type(record).model_fields if name in record.model_fields_set]
            yield f"layers.{place}.{section}.", section, record, names


def _values(recipe: Recipe, section: str, name: str) -> set[Any]:
    """Return the values of a field, in its section and in the exceptions that state it."""
    partials = [getattr(entry, section) for entry in recipe.layers]
    stated = {getattr(partial, name) for partial in partials if name in partial.model_fields_set}
    return {getattr(getattr(recipe, section), name), *stated}


def _has(section: str, name: str, *wanted: Any) -> Callable[[Recipe], bool]:
    return lambda recipe: bool(_values(recipe, section, name) & set(wanted))


def _quantizes_inputs(recipe: Recipe) -> bool:
    return recipe.activations.bits is not None


def _has_mode(*wanted: ActivationMode) -> Callable[[Recipe], bool]:
    """Whether inputs of layers, or operands of attention, have one of these modes."""
    of_layers = _has("activations", "mode", *wanted)
    return lambda recipe: of_layers(recipe) or (recipe.attention.enabled and recipe.attention.mode in wanted)


def _keeps_steps_apart(recipe: Recipe) -> bool:
    per_step = _quantizes_inputs(recipe) and _has_mode(ActivationMode.PER_STEP)(recipe)
    return per_step or recipe.passes.temporal is not None


_INPUTS = frozenset({"symmetric", "mode", "range", "percentile", "step_bits", "type", "range_bits"})
_RECORDED = _has_mode(ActivationMode.STATIC, ActivationMode.PER_STEP)

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
        (_INPUTS, "activations.bits", _quantizes_inputs),
        (frozenset({"range", "percentile"}), "activations.mode static or per_step", _RECORDED),
        (
            frozenset({"percentile"}),
            "activations.range percentile",
            _has("activations", "range", RangeMethod.PERCENTILE),
        ),
        (frozenset({"symmetric"}), "activations.type int", _has("activations", "type", NumberType.INT)),
        (frozenset({"unknown_timestep"}), "activations.mode per_step or passes.temporal", _keeps_steps_apart),
    ),
    "attention": (
        (frozenset({"enabled", "mode", "bits", "softmax_bits"}), "activations.bits", _quantizes_inputs),
        (
            frozenset({"mode", "bits", "softmax_bits"}),
            "attention.enabled true",
            lambda recipe: recipe.attention.enabled,
        ),
    ),
}
