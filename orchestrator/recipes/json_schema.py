"""The JSON schemas of recipe and search files, for editors and other tools; `make reference` publishes them."""

from __future__ import annotations

from typing import Any

from quant_spec.recipe import Recipe
from quant_spec.search import SearchSpec

#: Sections where null is a value or an error, never the removal of what was inherited.
_EXACT = {"LayerException", "WeightsException", "ActivationsException"}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file: a recipe's keys, each of which may be null, and `extends`."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Quantmill recipe"
    for definition in (schema, *(d for name, d in schema["$defs"].items() if name not in _EXACT)):
        if "properties" in definition:  # a choice has none
            definition["properties"] = {name: _nullable(value) for name, value in definition["properties"].items()}
    extends = {"type": ["string", "null"], "description": "A shipped recipe, or a file relative to this one."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    component = schema["$defs"]["ComponentRecipe"]
    component["properties"] = {"extends": extends, **component["properties"]}
    for option in schema["properties"]["components"]["anyOf"]:
        if "patternProperties" in option:  # a recipe's name or file stands for all that it says
            option["patternProperties"] = {
                name: {"anyOf": [{"type": ["string", "null"]}, value]}
                for name, value in option["patternProperties"].items()
            }
    return schema


def search_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a search's file."""
    schema = SearchSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Quantmill search"
    return schema


def _nullable(value: dict[str, Any]) -> dict[str, Any]:
    """Let a property be null, which removes what was inherited."""
    notes: dict[str, Any] = {key: value[key] for key in ("default", "description", "title") if key in value}
    plain = {key: item for key, item in value.items() if key not in notes}
    options = plain["anyOf"] if set(plain) == {"anyOf"} else [plain]
    if {"type": "null"} not in options:
        options = [*options, {"type": "null"}]
    return {"anyOf": options, **notes}
