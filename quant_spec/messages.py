"""Say what is wrong with a recipe in one line: what, got, wanted."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "model": "a mapping",
    "model_attributes": "a mapping",
    "dict": "a mapping",
    "tuple": "a list",
    "list": "a list",
    "finite_number": "a finite number",
    "missing": "a value",
    "bytes_text": "a number of bytes, or text like 2.8MB",
}
_BOUNDS = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
    "string_pattern_mismatch": ("pattern", "text like {}"),
    "string_too_short": ("min_length", "at least {} character"),
    "string_too_long": ("max_length", "at most {} characters"),
    "too_short": ("min_length", "{} items"),
    "too_long": ("max_length", "at most {} items"),
}


def first_problem(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return the first problem of a validation as one line.

    Parameters
    ----------
    error
        From validating `model`.
    prefix
        Path of what was validated within the recipe.
    """
    problems = error.errors(include_url=False)
    problem = problems[0]
    path = dotted((prefix, *problem["loc"]))
    joint = "." if path and problem["type"] == "value_error" else ""
    text = f"{path}{joint}{_sentence(problem, model)}"
    return text if len(problems) == 1 else f"{text} (and {len(problems) - 1} more)"


def nearest(word: str, known: Collection[str]) -> str:
    """Return which of the known words was probably meant, as a phrase to append to a message."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if close:
        return f"; nearest: {close[0]}"
    return f"; known: {', '.join(known)}" if known else ""


def dotted(parts: Sequence[str | int]) -> str:
    """Join the parts of a path, leaving out empty ones."""
    return ".".join(str(part) for part in parts if part != "")


def shown(value: Any) -> str:
    """Return a value as it would stand in YAML, shortened."""
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the part of a message after the path."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])  # starts with the field's name
    if kind == "extra_forbidden":
        parents, key = problem["loc"][:-1], str(problem["loc"][-1])
        return f": unknown key{nearest(key, _keys(model, parents))}"
    return f": got {'nothing' if kind == 'missing' else shown(problem['input'])}, wanted {_wanted(problem)}"


def _wanted(problem: ErrorDetails) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return "one of " + context["expected"].replace(" or ", ", ").replace("'", "")
    if kind in _BOUNDS:
        key, phrase = _BOUNDS[kind]
        return phrase.format(context[key])
    return _TYPES.get(kind.removesuffix("_type"), problem["msg"].removeprefix("Input should be ").lower())


def _keys(model: type[BaseModel], parents: Sequence[str | int]) -> list[str]:
    """Return the valid keys of the mapping at a path."""
    for part in parents:
        if isinstance(part, str):
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, looking into lists and optionals."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for item in typing.get_args(annotation) if (found := _section(item))), None)
