"""What a recipe says in vain: fields that nothing reads beside the values of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.errors import RecipeError
from quant_spec.messages import shown
from quant_spec.record import Record, to_json


def refuse_idle(recipe: Record, below: Mapping[str, Any]) -> None:
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
    for path, record, name in _idle(recipe, ""):
        value = to_json(getattr(record, name))
        if value in (_inherited(below, path, name), to_json(type(record).model_fields[name].default)):
            continue
        needed = record.why_idle(name)
        why = f"which matters only with {needed}" if needed else "which nothing reads beside the others"
        raise RecipeError(f"{path}{name}: got {shown(value)}, {why}, wanted it left out")


def _idle(record: Record, path: str) -> Iterator[tuple[str, Record, str]]:
    """Yield (path, record, name) of each idle field of a record and those in it."""
    for name in type(record).model_fields:
        value = getattr(record, name)
        if name in record.idle_fields():
            yield path, record, name
        elif isinstance(value, Record):
            yield from _idle(value, f"{path}{name}.")


def _inherited(below: Mapping[str, Any], path: str, name: str) -> Any:
    value: Any = below
    for part in f"{path}{name}".split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
