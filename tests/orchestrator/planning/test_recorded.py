"""The names of all tasks of the shipped recipes on the shipped models stay what they were.

`recorded/tasks.json` has kind and id of each task, in the order planned. An id is the digest of kind, version,
parameters and inputs, so all of these are recorded by it: what changes one makes homes compute it again. A change that
is meant is recorded by

    python -m tests.orchestrator.planning.test_recorded
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.db.rows import ModelRow
from orchestrator.planning.planner import plan
from orchestrator.recipes.files import shipped_names
from orchestrator.recipes.load import load_recipe

RECORDED = Path(__file__).parent / "recorded"
TASKS = RECORDED / "tasks.json"
MODELS = ("emoji32", "digits")
#: Shipped recipes for a bare denoiser: others name components of a pipeline.
RECIPES = [name for name in shipped_names() if not load_recipe(name).recipe.components]
DIGITS = 16


def planned(model: str, recipe: str) -> list[list[str]]:
    """Return kind and id of each task of a shipped recipe for a shipped model, whose inspection is recorded too."""
    row = json.loads((RECORDED / f"{model}.json").read_text())
    nodes, _ = plan(ModelRow(name=model, source="/models", **row), load_recipe(recipe).recipe)
    return [[node.kind, node.id[:DIGITS]] for node in nodes]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_task_has_its_recorded_name(model: str, recipe: str) -> None:
    assert planned(model, recipe) == json.loads(TASKS.read_text())[model][recipe]


def test_every_shipped_recipe_is_recorded() -> None:
    assert {model: sorted(recipes) for model, recipes in json.loads(TASKS.read_text()).items()} == {
        model: sorted(RECIPES) for model in MODELS
    }


if __name__ == "__main__":
    found = {model: {recipe: planned(model, recipe) for recipe in RECIPES} for model in MODELS}
    TASKS.write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
