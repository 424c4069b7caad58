"""Every field of every pass reaches a task that is told it under its name, or is refused.

A field that nothing reads beside the others is refused too, or renames no task if it is inherited.

Fields, and other values for them, are found from the records: a field that is added to one is tested here without an
entry, and fails if no task is told it. `BESIDE` has what must be set for fields that otherwise do not matter, `TOLD_AS`
the parameters of fields that tasks are told under another name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode
from orchestrator.recipes.load import load_recipe
from orchestrator.recipes.reference import sections
from quant_spec.keys import canonical_json
from quant_spec.kinds import KINDS
from quant_spec.passes.round import RoundFit
from quant_spec.passes.table import ANSWER, BY_EFFECT, PASSES, STEP_BITS
from quant_spec.recipe import Recipe
from quant_spec.record import Record, to_json
from tests.orchestrator.planning_models import inspection, model, nodes_of

#: A recipe with all passes, in which most fields matter.
ALL_PASSES = (
    *("weights.bits=4", "calibration.seeds=4", "evaluation={seeds: 4, shard_seeds: 4}"),
    *("activations.step_bits={seeds: 4, shard_seeds: 2}", "passes.temporal={cache: true}"),
    *("passes.scale={shift: variance}", "passes.allocate={}", "passes.round.method=closed_form"),
    *("passes.reconstruct={learn_activation_scales: true}", "passes.distill={seeds: 4, shard_seeds: 2}"),
    "passes.correct={seeds: 8, held_out_seeds: 4, shard_seeds: 4, batch_size: 2}",
)
#: What a menu can't stand beside.
_MENU = ("activations.step_bits=null", "passes.allocate=null", "passes.menu={activation_bits: [4]}")
#: For fields that do not matter there: what makes them matter.
BESIDE: Mapping[str, tuple[str, ...]] = {
    "activations.step_bits.threshold": ("activations.step_bits.method=snr",),
    "passes.menu.weight_bits": _MENU,
    "passes.menu.activation_bits": _MENU,
    # a number of bytes that some choice meets
    "passes.choose.bytes": ("passes.choose.bytes=1000000",),
    "passes.exceptions.choices": ("activations.step_bits=null", "passes.exceptions.choices=[4, 6, 8]"),
    "passes.temporal.finite_set": ("activations={step_bits: null, mode: static}",),
    "passes.scale.exponent": ("passes.scale.method=smooth",),
    "passes.scale.half_life": ("passes.scale.weighting=early",),
    "passes.low_rank.smoothing": ("passes.scale=null",),
    "passes.round.inputs": ("passes.reconstruct=null",),
    "passes.distill.norm_lr": ("passes.distill.codes=frozen",),
}
#: For sections that others of that recipe exclude: what takes these out.
INSTEAD: Mapping[str, tuple[str, ...]] = {
    "passes.low_rank": ("passes.allocate=null", "passes.low_rank={}"),
    "passes.differences": ("activations.step_bits=null", "passes.differences={}"),
    "passes.exceptions": ("passes.exceptions={}",),
    "passes.choose": (*_MENU, "passes.choose={}"),
}
#: Choices that are lists, beside which fields cannot matter.
LISTED: Mapping[str, tuple[str, ...]] = {
    "passes.exceptions": ("activations.step_bits=null", "passes.exceptions.choices=[4, 6, 8]")
}
_SHARD = frozenset({"seeds", "batch_size", "sqnr_seeds"})
#: Parameters that say a field under another name.
TOLD_AS: Mapping[str, frozenset[str]] = {
    **{
        f"{path}.{name}": _SHARD
        for path in ("activations.step_bits", "passes.distill", "passes.correct")
        for name in ("seeds", "first_seed", "shard_seeds")
    },
    "passes.correct.held_out_seeds": _SHARD,
    "passes.exceptions.seeds": _SHARD,
    "passes.exceptions.first_seed": _SHARD,
    "passes.exceptions.bytes": frozenset({"weights"}),  # whether any are tried
    "passes.temporal.finite_set": frozenset({"layers"}),  # in their formats
    "passes.allocate.method": frozenset({"units"}),  # in their layers' formats: whether channels have own bits
    "passes.round.method": frozenset({"rounding"}),
    "passes.round.inputs": frozenset(RoundFit.model_fields),  # to the nearest first, as codes are chosen again
}
#: Kinds of task that a section adds, which may come and go with it.
KINDS_OF = {"activations.step_bits": STEP_BITS} | {f"passes.{name}": kinds for name, kinds in PASSES.items()}
KINDS_OF["passes.round"] = ANSWER
KINDS_OF |= {f"passes.{n}": (*KINDS_OF[f"passes.{n}"], *BY_EFFECT) for n in ("distill", "differences", "exceptions")}
SECTIONS = {path: record for path, record in sections() if path in KINDS_OF}
FIELDS = [(path, name) for path, record in SECTIONS.items() for name in record.model_fields]


@cache
def load(*overrides: str) -> Recipe:
    return load_recipe("base", [*ALL_PASSES, *overrides]).recipe


def section_of(recipe: Recipe, path: str) -> Record:
    found: Any = recipe
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Record)
    return found


def with_section(recipe: Recipe, path: str, section: Record) -> Recipe:
    """Return the recipe with a section replaced, as if the one that it extends said so."""
    outer, _, last = path.rpartition(".")
    holder = section_of(recipe, outer)
    return recipe.replaced(**{outer: holder.replaced(**{last: section})})


def setting(path: str, name: str, value: Any) -> str:
    return f"{path}.{name}={json.dumps(value)}"


@cache
def planned(*overrides: str) -> list[TaskNode]:
    """Plan the recipe with all passes; the release, which repeats the recipe, is left out."""
    return nodes_of(load(*overrides), model(inspection(timed=True)))[:-1]


@cache
def schema_of(record: type[Record]) -> dict[str, Any]:
    return record.model_json_schema()


def candidates(schema: Mapping[str, Any], records: Mapping[str, Any], value: Any) -> Iterator[Any]:
    """Return other values for a field, some of which may be refused, from its JSON schema."""
    if "$ref" in schema:
        schema = records[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from candidates(option, records, value)
    elif "enum" in schema or "const" in schema:
        yield from schema.get("enum", [schema.get("const")])
    elif schema["type"] == "null":
        yield None
    elif schema["type"] == "boolean":
        yield not value
    elif schema["type"] == "array" and value is None:
        yield from ([item] for item in candidates(schema["items"], records, None))
    elif schema["type"] == "array":
        yield value[:-1]
        for place, item in enumerate(value):
            yield [*value[:place], item * 1.5, *value[place + 1 :]]
    else:
        start = value if isinstance(value, int | float) else 1
        kind = int if schema["type"] == "integer" else float
        yield from (kind(other) for other in (start + 1, 2 * start, start / 2, start + 0.25))


def others(recipe: Recipe, path: str, name: str, beside: Sequence[str] = ()) -> list[Any]:
    """Return the other values of a field that are accepted: all choices, or one number."""
    section = section_of(recipe, path)
    value, schema = to_json(getattr(section, name)), schema_of(type(section))
    found: list[Any] = []
    for other in candidates(schema["properties"][name], schema.get("$defs", {}), value):
        if other == value:
            continue
        try:
            load(*beside, setting(path, name, other))
        except RecipeError:
            continue
        found.append(other)
    return found if is_choice(type(section), name) else found[:1]


def is_choice(record: type[Record], name: str) -> bool:
    """Say whether a field is one of some named values, or a switch."""
    schema = schema_of(record)
    field = schema["properties"][name]
    field = schema.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2], field)
    return "enum" in field or "const" in field or field.get("type") == "boolean"


def told(nodes: Sequence[TaskNode]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the parameters of all tasks by kind; a field may change which units one task takes together."""
    kinds = {node.kind for node in nodes}
    return {kind: [own for node in nodes if node.kind == kind for own in by_unit(node.params)] for kind in kinds}


def by_unit(params: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return what a task is told of each of its units; of one without planned units, its parameters."""
    units = [unit for unit in params.get("units", ()) if isinstance(unit, Mapping) and "layers" in unit]
    layers = params.get("layers")
    for unit in units:
        if not isinstance(layers, list | tuple):
            yield {**params, "units": [unit]}
        elif own := [name for name in layers if name in unit["layers"]]:
            yield {**params, "units": [unit], "layers": own}
    if not units:
        yield params


def changed_names(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[set[str], set[str]]:
    """Return the parameters that differ in tasks of one kind, and those of them that only one side is told."""
    names = {name for params in (*before, *after) for name in params}
    if len(before) == len(after):
        pairs = list(zip(before, after, strict=True))
        differ = {name for name in names if any(one.get(name) != two.get(name) for one, two in pairs)}
        return differ, {name for name in differ if any((name in one) != (name in two) for one, two in pairs)}
    sides = [
        {name: {canonical_json(params.get(name)) for params in side} for name in names} for side in (before, after)
    ]
    return {name for name in names if sides[0][name] != sides[1][name]}, set()


@pytest.mark.parametrize(("path", "name"), FIELDS, ids=str)
def test_field_is_told_under_its_name_or_refused(path: str, name: str) -> None:
    field = f"{path}.{name}"
    beside = (*INSTEAD.get(path, ()), *BESIDE.get(field, ()))
    values = others(load(*beside), path, name, beside)
    if not values:  # there is but one value
        choices = schema_of(SECTIONS[path])["properties"][name]
        assert "const" in choices, f"{field}: found no other value"
        return
    names = {name} | TOLD_AS.get(field, frozenset())
    before = told(planned(*beside))
    for value in values:
        after = told(planned(*beside, setting(path, name, value)))
        assert before.keys() ^ after.keys() <= set(KINDS_OF[path])
        seen = False
        for kind in before.keys() & after.keys():
            differ, one_sided = changed_names(before[kind], after[kind])
            if not differ:
                continue
            seen = True
            assert differ & names, f"{field}: {kind} is told other {', '.join(sorted(differ))}"
            assert differ - names <= one_sided, f"{field}: {kind} is told other {', '.join(sorted(differ - names))}"
            assert differ <= KINDS[kind].params.model_fields.keys()
        assert seen, f"{field}={value}: no task is told it"


def idle_cases() -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Return (choice as assignments, path, field that cannot matter under it) for each choice of each pass."""
    for path, record in SECTIONS.items():
        beside = INSTEAD.get(path, ())
        for choice in (name for name in record.model_fields if is_choice(record, name)):
            default = to_json(getattr(section_of(load(*beside), path), choice))
            for value in (default, *others(load(*beside), path, choice, beside)):
                assignment = setting(path, choice, value)
                section = section_of(load(*beside, assignment), path)
                for name in sorted(section.idle_fields() - record._omitted):
                    yield (*beside, assignment), path, name

    for path, chosen in LISTED.items():
        beside = (*INSTEAD.get(path, ()), *chosen)
        section = section_of(load(*beside), path)
        for name in sorted(section.idle_fields() - section._omitted):
            yield beside, path, name


IDLE = list(idle_cases())


@pytest.mark.parametrize(
    ("choice", "path", "name"), IDLE, ids=lambda value: value if isinstance(value, str) else value[-1]
)
def test_field_that_cannot_matter_is_refused_and_where_it_is_inherited_renames_no_task(
    choice: tuple[str, ...], path: str, name: str
) -> None:
    before = [node.id for node in planned(*choice)]
    section = section_of(load(*choice), path)
    value = to_json(getattr(section, name))
    schema = schema_of(type(section))
    found = False
    for other in candidates(schema["properties"][name], schema.get("$defs", {}), value):
        try:
            changed = type(section).model_validate_json(json.dumps({**section.model_dump(mode="json"), name: other}))
        except ValidationError:
            continue
        if to_json(getattr(changed, name)) in (value, type(section).model_fields[name].default):
            continue
        found = True
        with pytest.raises(RecipeError, match=rf"^{re.escape(f'{path}.{name}')}: got .* wanted it left out$"):
            load(*choice, setting(path, name, other))
        inherited = with_section(load(*choice), path, changed)
        assert [node.id for node in nodes_of(inherited, model(inspection(timed=True)))[:-1]] == before
    assert found


def test_fields_that_can_be_idle_are_all_tried() -> None:
    """Each field that some choice makes idle is among the cases; `_omitted` ones are told exactly if they are set."""
    conditional = {
        (path, name) for path, record in SECTIONS.items() for names in record._only_if.values() for name in names
    }
    tried = {(path, name) for _, path, name in IDLE}
    assert {(path, name) for path, name in conditional if name not in SECTIONS[path]._omitted} <= tried
    for path, record in SECTIONS.items():
        for name in record._omitted:
            assert name not in section_of(load(*INSTEAD.get(path, ())), path).to_json()
