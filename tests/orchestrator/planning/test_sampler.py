"""Which scheduler tasks are told of, and whether samples are pixels."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.planning.planner import plan
from quant_spec.errors import QuantizationError
from tests.orchestrator.planning_models import inspection, model, nodes_of, only, recipe

SOLVER = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("own", "named", "scheduler"),
    [
        ({"_class_name": "DDPMScheduler"}, "null", "DDIMScheduler"),
        (SOLVER, "null", "DPMSolverMultistepScheduler"),
        (SOLVER, "DDIMScheduler", "DDIMScheduler"),
    ],
)
def test_tasks_are_told_the_scheduler_and_the_release_the_recipe(
    own: dict[str, Any], named: str, scheduler: str
) -> None:
    chosen = recipe("mpqdm-w4a4", f"sampler.scheduler={named}", "passes.correct={}")
    nodes = nodes_of(chosen, model(inspection() | {"scheduler": own}))
    told = [node.params["sampler"]["scheduler"] for node in nodes if "sampler" in node.params]
    assert set(told) == {scheduler}
    assert {node.kind for node in nodes if "sampler" in node.params} == {
        *("calibrate", "reference", "pack", "noise", "evaluate", "score")
    }
    assert only(nodes, "release").params["recipe"]["config"]["sampler"]["scheduler"] == (
        None if named == "null" else named
    )


def test_naming_the_models_own_scheduler_changes_no_task_but_the_release() -> None:
    row = model(inspection() | {"scheduler": SOLVER})
    null = nodes_of(recipe("fast-w4a8"), row)
    named = nodes_of(recipe("fast-w4a8", "sampler.scheduler=DPMSolverMultistepScheduler"), row)
    assert [node.id for node in null[:-1]] == [node.id for node in named[:-1]]


@pytest.mark.parametrize("own", [{"_class_name": "FlowMatchEulerDiscreteScheduler"}, None])
def test_a_scheduler_that_does_not_fit_is_refused_before_any_task(own: dict[str, Any] | None) -> None:
    row = model(inspection() | {"scheduler": own})
    with pytest.raises(QuantizationError, match=r"sampler\.scheduler: got DDIMScheduler"):
        plan(row, recipe("base", "sampler.scheduler=DDIMScheduler"))


def test_whether_samples_are_pixels_is_told_to_what_measures() -> None:
    nodes = nodes_of(recipe(), model(inspection() | {"samples": "latents"}))
    assert {node.kind: node.params["samples"] for node in nodes if "samples" in node.params} == {
        "evaluate": "latents",
        "score": "latents",
    }


@pytest.mark.parametrize(
    ("scheduler", "read"),
    [("DDIMScheduler", ["eta=0.5", "guidance_scale=2"]), ("EulerDiscreteScheduler", ["timestep_scale=0.5"])],
)
def test_fields_that_a_sampler_reads_name_all_tasks(scheduler: str, read: list[str]) -> None:
    def ids(*settings: str) -> list[str]:
        changes = [f"sampler.{setting}" for setting in (f"scheduler={scheduler}", *settings)]
        return [
            node.id for node in nodes_of(recipe("fast-w4a8", *changes))[:-1]
        ]  # the release has the recipe as written

    plain = ids()
    for setting in read:
        assert not set(ids(setting)) & set(plain), setting


@pytest.mark.parametrize(
    ("scheduler", "setting", "message"),
    [
        ("DDIMScheduler", "mu=0.5", r"sampler\.mu: got 0\.5, wanted null: DDIMScheduler as configured"),
        ("DDIMScheduler", "null_class=3", r"sampler\.null_class: got 3, wanted null: guidance_scale 1 calls"),
        ("EulerDiscreteScheduler", "eta=0.5", r"sampler\.eta: got 0\.5, wanted 0: EulerDiscreteScheduler takes no"),
    ],
)
def test_fields_that_a_sampler_does_not_read_are_refused(scheduler: str, setting: str, message: str) -> None:
    chosen = recipe("fast-w4a8", f"sampler.scheduler={scheduler}", f"sampler.{setting}")
    with pytest.raises(RecipeError, match=message):
        plan(model(inspection()), chosen)
