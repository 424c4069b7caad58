"""Conditioning, guidance and null classes that don't fit a model are refused when a job is planned."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.planning.planner import plan
from tests.orchestrator.planning_models import inspection, model, recipe


def told(**needs: Any) -> ModelRow:
    """A model that needs nothing, and has neither labels nor anything that stands for no condition, but for `needs`."""
    complete: dict[str, Any] = {"missing_conditioning": [], "null_conditioning": [], "label_count": None}
    return model(inspection() | complete | needs)


LABELS = {"label_count": 5}
EXTRA_CLASS = {"label_count": 6, "null_conditioning": ["class_labels"]}
GUIDED = "sampler.guidance_scale=4"


@pytest.mark.parametrize(
    ("needs", "overrides", "message"),
    [
        (
            {"missing_conditioning": ["pooled_projections"]},
            [],
            "got no pooled_projections, wanted conditioning.safetens",
        ),
        ({}, [GUIDED], r"guidance_scale: got 4, .* wanted 1, or rows null\.\*"),
        (LABELS, [GUIDED], "wanted 1, or sampler.null_class, or rows null"),
        (LABELS, [GUIDED, "sampler.null_class=5"], "null_class: got 5 .* a label, 0 to 4"),
        ({}, ["sampler.null_class=0"], "null_class: got 0 .* wanted null, as the model has no class labels"),
    ],
)
def test_what_does_not_fit_is_refused(needs: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(told(**needs), recipe("base", *overrides))


@pytest.mark.parametrize(
    ("needs", "overrides"),
    [
        ({}, []),
        (LABELS, [GUIDED, "sampler.null_class=4"]),
        (EXTRA_CLASS, [GUIDED]),
        ({"null_conditioning": ["encoder_hidden_states"]}, [GUIDED]),
    ],
)
def test_what_fits_is_planned(needs: dict[str, Any], overrides: list[str]) -> None:
    assert plan(told(**needs), recipe("base", *overrides))[1].kind == "release"
