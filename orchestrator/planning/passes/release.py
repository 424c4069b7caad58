"""Release: the packed model with its figures and its origin, as it is published."""

from __future__ import annotations

import json

from orchestrator.planning.costs import SMALL
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.recipes.load import resolve
from quant_spec.tasks.release import KIND, FusedLora, Inputs, Origin, Params, ResolvedRecipe

_HUB = "hf:"


def release(draft: Draft) -> Drawing:
    """Make the job's last task."""
    # a release tells what decides its bytes, not where they were computed
    row, recipe = draft.row, draft.given.without_how_it_runs()
    resolved = resolve(recipe)
    # a folder's path means nothing on another machine
    origin = Origin(
        name=row.name,
        class_name=row.class_name,
        source=row.source if row.source.startswith(_HUB) else None,
        loras=tuple(FusedLora(**each) for each in row.inspection.get("loras", ())),
    )
    params = Params(
        model=origin,
        recipe=ResolvedRecipe(name=recipe.name, digest=resolved.digest, config=json.loads(resolved.json)),
    )
    if draft.score is None:
        raise ValueError("draft: got no score, wanted release after evaluate")
    inputs = Inputs(draft.packed_model, draft.score, draft.calibration, draft.model.digest, draft.whole)
    yield draft.node(KIND, params, inputs, SMALL, recipe.name)
    return draft
