"""The names of all tasks of the shipped recipes on the shipped models stay what they were.

`recorded/tasks.json` has kind and id of each task, in the order planned, from before task parameters became records;
an id is the digest of kind, version, parameters and inputs, so all of these are recorded by it. Kinds whose version has
risen since then are in `RISEN`: for them a plan's parameters plus those that were removed must have the recorded name.
Recipes that have other formats since then are planned with those that they had (`FORMATS`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.db.rows import ModelRow
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.planner import plan
from orchestrator.recipes.load import load_recipe, recipe_digest
from quant_spec.keys import task_digest
from quant_spec.kinds import KINDS

RECORDED = Path(__file__).parent / "recorded"
TASKS: dict[str, dict[str, list[list[str]]]] = json.loads((RECORDED / "tasks.json").read_text())
#: Groups of weights had float scales, and were twice as large.
FORMATS = {
    recipe: ("weights.group_scale=float", f"weights.group_size={128 if recipe == 'fast-w4a8' else 64}")
    for recipe in TASKS["emoji32"]
    if (recipe.endswith(("w4a8", "w4a6")) or recipe == "ptqd-w4-mixed")
}
#: Recipes whose layers' bits were a list.
LISTED = ("passes.choose=null", "passes.menu=null")
FORMATS |= {recipe: (*FORMATS[recipe], *LISTED) for recipe in FORMATS if recipe.startswith("dmq-")}
FORMATS |= {recipe: (*FORMATS[recipe], "passes.exceptions=null") for recipe in FORMATS if recipe.endswith("w4a6")}
#: Recipes that had no exceptions found by measurement.
NO_EXCEPTIONS = {recipe: ("passes.exceptions=null",) for recipe in ("tfmq-w8a8", "dmq-w8a8")}
#: What attention multiplies had the mode of layers' inputs, and its probabilities 8 bits.
ATTENTION = ("attention.mode=null", "attention.softmax_bits=8")
CASES = [(model, recipe) for model, recipes in TASKS.items() for recipe in recipes]
DIGITS = 16


@dataclass(frozen=True)
class Risen:
    """A kind whose version has risen, and what it was told before."""

    old: int
    new: int
    before: Callable[[TaskNode, Plan], Mapping[str, Any]]


class Plan:
    """The tasks of a job, and what the removed parameters said of it."""

    def __init__(self, nodes: list[TaskNode]) -> None:
        self.nodes = nodes
        self.by_id = {node.id: node for node in nodes}
        rounding = [node for node in nodes if node.kind in ("round", "menu")]
        self.units = {unit["unit"]: unit for node in rounding for unit in node.params["units"]}
        #: in the order in which they run
        self.names = [node.params["unit"] for node in nodes if node.kind == "temporal"] + list(self.units)

    def source(self, node: TaskNode, name: str) -> TaskNode:
        """Return the task that gives a task's only input of a name."""
        (item,) = node.inputs[name]
        assert isinstance(item, TaskRef)
        return self.by_id[item.task]


def units_before(node: TaskNode, plan: Plan) -> dict[str, Any]:
    """Return what tasks before the allocation were told of their units: also which channels it would concern."""
    return {"units": [plan.units[unit["unit"]] for unit in node.params["units"]]}


def without_samples(node: TaskNode) -> dict[str, Any]:
    """Return what a task was told before it was told whether samples are pixels."""
    return {name: value for name, value in node.params.items() if name != "samples"}


def kept_biases(node: TaskNode, *others: str) -> dict[str, Any]:
    """Return what a task was told before biases took the mean error, and before it was told of `others`."""
    return {name: value for name, value in node.params.items() if name not in {"correct_bias", *others}}


#: Relations were summed over 256 positions.
SUMMED_RELATIONS = {"relation_weight": 100.0}

RISEN = {
    # Biases take the mean error since then.
    "round": Risen(1, 2, lambda node, plan: {**kept_biases(node), "cache_bytes": 2 * 2**30, "inputs": "fp"}),
    "reconstruct": Risen(1, 2, lambda node, plan: {**node.params, **plan.units[node.label]}),
    "distill": Risen(2, 4, lambda node, plan: {**node.params, **SUMMED_RELATIONS, "units": plan.names}),
    "pack": Risen(2, 3, lambda node, plan: {**node.params, "units": plan.names}),
    "scale": Risen(2, 3, lambda node, plan: {"samples": 32, **node.params, **units_before(node, plan)}),
    # They were those of nearest rounding, whatever rounding was to follow.
    "channel_errors": Risen(
        3, 4, lambda node, plan: {**kept_biases(node, "rounding", "damping"), **units_before(node, plan)}
    ),
    "evaluate": Risen(
        1,
        2,
        lambda node, plan: {
            **without_samples(node),
            "sqnr_seeds": plan.source(node, "reference").params["sqnr_seeds"],
        },
    ),
    "score": Risen(1, 5, lambda node, plan: without_samples(node)),
    # Their knapsack is solved by another program, which chooses otherwise among what costs the same.
    "allocate": Risen(2, 3, lambda node, plan: node.params),
    "step_bits": Risen(2, 3, lambda node, plan: node.params),
}


def recipe_before(params: dict[str, Any]) -> dict[str, Any]:
    """Return what a release was told when `base` named a scheduler, which was the one that both models have now.

    And when no guidance was 1, and not what the model's pipeline has, and `round` said whose inputs it read.
    """
    config = params["recipe"]["config"]
    config = config | {"sampler": config["sampler"] | {"scheduler": "DDIMScheduler", "guidance_scale": 1.0}}
    rounding = {name: value for name, value in config["passes"]["round"].items() if name != "correct_bias"}
    rounding |= {"inputs": "fp"}
    config |= {"passes": config["passes"] | {"round": rounding}}
    distill = config["passes"]["distill"]
    if distill is not None:
        relations = SUMMED_RELATIONS if distill["relations"] else {}
        alike = {name: value for name, value in distill.items() if name != "effect"}
        config |= {"passes": config["passes"] | {"distill": alike | relations}}
    return params | {"recipe": params["recipe"] | {"config": config, "digest": recipe_digest(config)}}


@cache
def planned(model: str, recipe: str, formats: tuple[str, ...] | None = None) -> Plan:
    """Plan a shipped recipe for a shipped model, whose inspection is recorded too; in the formats that it had."""
    row = json.loads((RECORDED / f"{model}.json").read_text())
    overrides = (*(FORMATS | NO_EXCEPTIONS).get(recipe, ()), *ATTENTION) if formats is None else formats
    return Plan(list(plan(ModelRow(name=model, source="/models", **row), load_recipe(recipe, overrides).recipe)[0]))


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_every_task_has_its_recorded_name_once_removed_parameters_are_put_back(model: str, recipe: str) -> None:
    job, recorded = planned(model, recipe), TASKS[model][recipe]
    assert [node.kind for node in job.nodes] == [kind for kind, _ in recorded]
    before: dict[str, str] = {}  # id -> the id that it had
    for node, (_, name) in zip(job.nodes, recorded, strict=True):
        params, version = dict(node.params), node.version
        if node.kind in RISEN:
            params, version = dict(RISEN[node.kind].before(node, job)), RISEN[node.kind].old
        if node.kind == "release":
            params = recipe_before(params)
        inputs = {
            key: [
                {"task": before[item.task], "output": item.output} if isinstance(item, TaskRef) else item
                for item in items
            ]
            for key, items in node.inputs.items()
        }
        before[node.id] = task_digest(node.kind, version, params, inputs)
        assert before[node.id][:DIGITS] == name, f"{node.kind} {node.label}"


@pytest.mark.parametrize(("model", "recipe"), CASES)
def test_tasks_that_follow_no_risen_kind_have_their_recorded_ids(model: str, recipe: str) -> None:
    job = planned(model, recipe)
    renamed: set[str] = set()
    kept: set[str] = set()
    for node, (_, name) in zip(job.nodes, TASKS[model][recipe], strict=True):
        if node.kind in RISEN or node.sources() & renamed:
            renamed.add(node.id)
            assert node.id[:DIGITS] != name
        else:
            kept.add(node.kind)
            assert node.id[:DIGITS] == name, f"{node.kind} {node.label}"
    assert {"calibrate", "reference"} <= kept


@pytest.mark.parametrize("recipe", TASKS["emoji32"])
def test_what_a_format_does_not_concern_keeps_its_tasks(recipe: str) -> None:
    now, then = planned("emoji32", recipe, ()), planned("emoji32", recipe)
    kept = {node.kind for node in now.nodes if node.id in then.by_id}
    assert {"calibrate", "reference"} <= kept
    attention = planned("emoji32", recipe, ATTENTION)
    assert now.by_id.keys() != attention.by_id.keys()
    assert (attention.by_id.keys() == then.by_id.keys()) is (recipe not in FORMATS | NO_EXCEPTIONS)
    if recipe in FORMATS:
        groups = [layer["weight"] for unit in now.units.values() for layer in unit["layers"].values()]
        assert {each.get("group_scale") for each in groups} == {None, "integer"}


def test_only_the_kinds_that_are_listed_have_risen() -> None:
    assert {kind: risen.new for kind, risen in RISEN.items()} == {kind: KINDS[kind].version for kind in RISEN}
    kinds = {kind for recipes in TASKS.values() for tasks in recipes.values() for kind, _ in tasks}
    kept = {
        **{"calibrate": 1, "reference": 1, "temporal": 1, "step_effects": 1},
        **{"noise": 1, "correct": 1, "release": 1},
    }
    assert kinds == kept.keys() | RISEN.keys()
    assert kept == {kind: KINDS[kind].version for kind in kept}
