"""The reference of recipes and searches, written from the records: their JSON schemas, and the tables of their fields.

`python -m orchestrator.recipes.reference` (or `make reference`) writes docs/recipe.schema.json, docs/recipes.md,
docs/search.schema.json and docs/search.md in the folder that it is started in. In the pages, what lies between
`<!-- fields of SECTION -->` and `<!-- end -->` is written; the rest is prose.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from orchestrator.recipes.json_schema import json_schema, search_json_schema
from orchestrator.recipes.load import load_recipe
from quant_spec.recipe import Recipe
from quant_spec.record import Partial, Record, to_json
from quant_spec.search import SearchSpec

SCHEMA_FILE, FIELDS_FILE = "docs/recipe.schema.json", "docs/recipes.md"
SEARCH_SCHEMA_FILE, SEARCH_FIELDS_FILE = "docs/search.schema.json", "docs/search.md"
#: Names of the sections that are the recipe, or the search, itself.
WHOLE, WHOLE_SEARCH = "a recipe", "a search"

_BLOCK = re.compile(r"(?<=^<!-- fields of )(?P<name>[^\n]+?)(?P<open> -->\n).*?(?=^<!-- end -->$)", re.M | re.S)
_BASE = "base"
#: Bounds of JSON schema, as they stand before a number, after it, and after it if there is no other.
_LOWER = {"minimum": ("≤", "≥"), "exclusiveMinimum": ("<", ">")}
_UPPER = {"maximum": "≤", "exclusiveMaximum": "<"}
_LONG = 2**31
_TYPES = {"integer": "integer", "number": "number", "string": "text", "object": "mapping", "null": "null"}


def main() -> None:
    """Write all files anew."""
    Path(SCHEMA_FILE).write_text(schema_text(), encoding="utf-8")
    Path(SEARCH_SCHEMA_FILE).write_text(search_schema_text(), encoding="utf-8")
    for name, section, whole in ((FIELDS_FILE, Recipe, WHOLE), (SEARCH_FIELDS_FILE, SearchSpec, WHOLE_SEARCH)):
        page = Path(name)
        page.write_text(with_tables(page.read_text(encoding="utf-8"), section, whole), encoding="utf-8")


def schema_text() -> str:
    """Return the file with the JSON schema of recipes."""
    return json.dumps(json_schema(), indent=2) + "\n"


def search_schema_text() -> str:
    """Return the file with the JSON schema of searches."""
    return json.dumps(search_json_schema(), indent=2) + "\n"


def with_tables(page: str, section: type[Record] = Recipe, whole: str = WHOLE) -> str:
    """Return a page with its tables of the fields of a record, and of those in it, written anew.

    Raises
    ------
    ValueError
        If it has not one place for each section.
    """
    wanted = {name: field_table(name, each) for name, each in sections("", section, whole)}
    found = [match["name"] for match in _BLOCK.finditer(page)]
    if sorted(found) != sorted(wanted):
        lacks = ", ".join(sorted(wanted.keys() - found)) or "none"
        raise ValueError(
            f"page of {whole}: got fields of {', '.join(found)}, wanted each section once; missing: {lacks}"
        )
    return _BLOCK.sub(lambda match: f"{match['name']}{match['open']}{wanted[match['name']]}", page)


def sections(path: str = "", section: type[Record] = Recipe, whole: str = WHOLE) -> Iterator[tuple[str, type[Record]]]:
    """Return the sections of a record, each with the path to it, the record itself first."""
    yield path or whole, section
    for name, field in section.model_fields.items():
        below = _record_in(field.annotation)
        if below is not None and not issubclass(below, Partial):
            yield from sections(f"{path}.{name}" if path else name, below)


def field_table(name: str, section: type[Record]) -> str:
    """Return the Markdown table of a section's fields: default, values, meaning."""
    schema = section.model_json_schema()
    values: Any = None if name == WHOLE else load_recipe(_BASE).recipe
    for part in name.split("."):
        values = getattr(values, part, None)
    rows = ["| field | default | values | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        default = "" if field.default is PydanticUndefined else _default(field.default)
        if isinstance(values, Record) and default and (own := _default(getattr(values, key))) != default:
            default = f"{default} (`{_BASE}`: {own})"
        wanted = _values(schema["properties"][key], schema.get("$defs", {}))
        rows.append(f"| `{key}` | {default} | {wanted} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    """Return a default as it would stand in a recipe; `{}` is a section with the defaults of its fields."""
    plain = {} if isinstance(value, Record) else to_json(value)
    return "" if plain == "" else f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


def _values(schema: Mapping[str, Any], records: Mapping[str, Any]) -> str:
    """Return what a field may be, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_values(option, records) for option in schema["anyOf"])
    if "$ref" in schema:
        return _values(records[schema["$ref"].rpartition("/")[2]], records)
    choices = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = schema.get("type")
    if kind == "boolean":
        return "`true`, `false`"
    if kind == "array":
        parts = [_values(item, records) for item in schema.get("prefixItems", ())]
        return f"[{', '.join(parts)}]" if parts else f"list of {_values(schema['items'], records)}"
    return _bounded(_TYPES[kind], schema) if kind in _TYPES else "any"


def _bounded(kind: str, schema: Mapping[str, Any]) -> str:
    """Return a type with its bounds."""
    if "pattern" in schema:
        return f"{kind} like `{schema['pattern'].replace('|', chr(92) + '|')}`"
    lower = next((key for key in _LOWER if key in schema), None)
    upper = next((f" {sign} {_number(schema[key])}" for key, sign in _UPPER.items() if key in schema), "")
    if lower is None:
        return f"{kind}{upper}"
    before, after = _LOWER[lower]
    bound = _number(schema[lower])
    return f"{bound} {before} {kind}{upper}" if upper else f"{kind} {after} {bound}"


def _number(value: float) -> str:
    """Return a bound; a long power of two or ten as such."""
    if value >= 10**6 and value == 10 ** (zeros := len(f"{value:.0f}") - 1):
        return f"10^{zeros}"
    power = int(value).bit_length() - 1
    return f"2^{power}" if value > _LONG and value == 2**power else f"{value:g}"


def _record_in(annotation: Any) -> type[Record] | None:
    """Return the record that a field holds, looking into lists and optionals."""
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation if issubclass(annotation, Record) else None
    return next((found for item in typing.get_args(annotation) if (found := _record_in(item))), None)


if __name__ == "__main__":
    main()
