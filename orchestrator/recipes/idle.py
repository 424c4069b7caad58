"""What a recipe says in vain: fields that nothing reads beside the values of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.errors import RecipeError
from quant_spec.idle_formats import IdleField, idle_formats
from quant_spec.messages import shown
from quant_spec.recipe import Recipe
from quant_spec.record import Record, to_json


def refuse_idle(recipe: Recipe, below: Mapping[str, Any]) -> None:
    """Refuse fields that cannot matter, if the last to speak sets them: overrides, or without any the recipe's file.

    Parameters
    ----------
    recipe
        The whole, checked.
    below
        What that goes on top of, as mappings. A field that has the value from there, or its default, is inherited, and
        may be idle: who sets `method: nearest` need not take back what belongs to the method before.

    Raises
    ------
    RecipeError
        Naming the first such field.
    """
    for idle in (*_idle(recipe, ""), *idle_formats(recipe)):
        value = to_json(getattr(idle.record, idle.name))
        default = to_json(type(idle.record).model_fields[idle.name].default)
        if value in (_inherited(below, idle.path, idle.name), default):
            continue
        why = f"which matters only with {idle.needed}" if idle.needed else "which nothing reads beside the others"
        raise RecipeError(f"{idle.path}{idle.name}: got {shown(value)}, {why}, wanted it left out")


def _idle(record: Record, path: str) -> Iterator[IdleField]:
    """Yield the fields of a record, and of those in it, that cannot matter beside the others of the same record."""
    for name in type(record).model_fields:
        value = getattr(record, name)
        if name in record.idle_fields():
            yield IdleField(path, record, name, record.why_idle(name))
        elif isinstance(value, Record):
            yield from _idle(value, f"{path}{name}.")


def _inherited(below: Mapping[str, Any], path: str, name: str) -> Any:
    value: Any = below
    for part in f"{path}{name}".split("."):
        if isinstance(value, list | tuple):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value
