"""The job that ends in proposals: every choice measured on a model, then an exact choice within each budget.

Rounds after the first find all sensitivities recorded, so that only the last task runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.graph import Resources, TaskNode, TaskRef, task_node
from orchestrator.planning.costs import SMALL
from orchestrator.planning.formats import choose_formats
from orchestrator.planning.model import ModelInfo
from orchestrator.planning.sensitivity import SensitivityOptions, plan_sensitivity
from orchestrator.search.candidates import menu_of
from orchestrator.search.fixed import fixed_layers
from orchestrator.search.jobs import PlannedJob
from quant_spec.allocation import LayerChoice, escaped
from quant_spec.enums import SearchUnit
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT, SearchSpec, Space
from quant_spec.tasks import propose

#: Share of a layer's output channels that may have the next width, where channels are a choice.
PROMOTED = 0.5


def plan_proposals(
    row: ModelRow,
    spec: SearchSpec,
    recipes: Mapping[str, Recipe],
    measured: Sequence[Mapping[str, Any]],
    latency: Mapping[str, Any] | None,
    tables: Mapping[str, Sequence[str]] | None = None,
) -> PlannedJob:
    """Plan the proposals for one model.

    Parameters
    ----------
    row
        The model.
    measured
        What was measured so far, as `propose.MeasuredPoint` has it.
    latency
        The table of latencies.
    tables
        Digests of tables to take in place of this model's own, by variant: those of a model that it starts from.
    """
    model = ModelInfo.read(row.digest, row.inspection)
    nodes: list[TaskNode] = []
    read: list[str | TaskRef] = []
    variants: list[str] = []
    if tables is not None:
        for variant, digests in tables.items():
            variants += [variant] * len(digests)
            read += digests
    else:
        for variant in spec.space.variant_names():
            plan = plan_sensitivity(row, recipes[variant], sensitivity_options(spec, model))
            nodes += plan.nodes
            variants += [variant] * len(plan.tables)
            read += plan.tables
    base = recipes[BASE_VARIANT]
    measured_latency = latency or {}
    params = propose.Params(
        variants=tuple(variants),
        budgets=spec.budgets,
        objective=spec.objective,
        candidates=spec.effort.candidates if spec.screening.seeds else spec.points,
        per_unit=spec.space.per is SearchUnit.UNIT,
        keep=spec.space.keep,
        measured=tuple(propose.MeasuredPoint.from_json(point) for point in measured),
        base=base_choices(model, base),
        activation_bits=base.activations.bits,
        latency=measured_latency.get("layers", {}),
        latency_rest_ms=measured_latency.get("rest_ms", 0.0),
        activation_bytes=model.activation_bytes,
        seed=spec.seed,
    )
    node = task_node(
        propose.KIND.name,
        params.to_json(),
        propose.Inputs(tuple(read)).to_json(),
        resources=Resources(memory_bytes=SMALL.memory_bytes),
        work=SMALL.work,
        label=f"after {len(measured)} points",
    )
    recipe = base.replaced(name=f"{spec.name}-sensitivity")
    return PlannedJob(recipe, (*nodes, node), node)


def sensitivity_options(spec: SearchSpec, model: ModelInfo) -> SensitivityOptions:
    """Return what is measured for a space."""
    space = spec.space
    return SensitivityOptions(
        widths=menu_of(spec),
        step_ranges=space.step_ranges,
        promoted=(PROMOTED,) if space.per is SearchUnit.CHANNELS else (),
        fixed=tuple(escaped(name) for name in fixed_layers(model, space)),
    )


def base_choices(model: ModelInfo, recipe: Recipe) -> dict[str, LayerChoice]:
    """Return what a recipe says of each layer and attention, where no choice does."""
    found: dict[str, Any] = {}
    units = choose_formats(model, recipe)
    for unit in units:
        for name, layer in unit.planned.layers.items():
            bits = None if layer.activation is None else layer.activation.bits
            found[name] = {"weight_bits": layer.weight.bits, "activation_bits": bits}
        for name, attention in unit.planned.attentions.items():
            found[name] = {"activation_bits": attention.activation.bits}
    kept = {layer.name for layer in model.layers} - found.keys()
    choices = {name: LayerChoice.model_validate(told) for name, told in found.items()}
    return choices | {name: LayerChoice(keep=True) for name in kept}


def same_table(mine: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Say whether two searches (their specs and recipes as JSON) measure the same choices of one architecture."""
    names = Space.model_fields
    return all(mine["spec"]["space"].get(name) == other["spec"]["space"].get(name) for name in names) and (
        _measuring(mine["recipes"]) == _measuring(other["recipes"])
    )


#: What of a recipe no sensitivity depends on.
_UNMEASURED = re.compile(r"name|description|evaluation|memory|resources|deterministic|budget")


def _measuring(recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value for key, value in recipe.items() if not _UNMEASURED.fullmatch(key)}
        for name, recipe in recipes.items()
    }
