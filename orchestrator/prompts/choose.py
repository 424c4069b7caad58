"""Which prompts file a job's pipeline is told from, and whether the file and the pipeline fit each other."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.recipes.load import LoadedRecipe
from quant_spec.errors import InvalidInputError
from quant_spec.prompts import read_prompts

#: 256 neutral prompts, in no order.
NEUTRAL = Path(__file__).with_name("neutral.txt")


@cache
def neutral_digest() -> str:
    """Return the SHA-256 of the shipped prompts."""
    return hashlib.sha256(NEUTRAL.read_bytes()).hexdigest()


def told_by(model: ModelRow) -> str | None:
    """Return what a model's pipeline is told: "prompt", "class_labels"; None for a bare denoiser, or neither."""
    pipeline: dict[str, Any] = model.inspection.get("pipeline") or {}
    told: str | None = pipeline.get("prompts")
    return told


def prompts_digest(model: ModelRow, stated: str | None) -> str | None:
    """Return the digest of the prompts file that tasks read: the recipe's, else the shipped one where it fits."""
    return neutral_digest() if stated is None and told_by(model) == "prompt" else stated


def with_prompts(loaded: LoadedRecipe, model: ModelRow) -> LoadedRecipe:
    """Return a recipe that names its prompts file, for a model that is told prompts.

    Raises
    ------
    RecipeError
        If it names one for a model that is told none, or of another kind than it is told.
    """
    stated, told = loaded.recipe.prompts, told_by(model)
    if stated is None:
        if told != "prompt":
            return loaded
        digest = neutral_digest()
        recipe = loaded.recipe.model_copy(update={"prompts": digest})
        return replace(loaded, recipe=recipe, files={**loaded.files, digest: NEUTRAL})
    if told is None:
        raise RecipeError(
            f"prompts: got a file for model {model.name}, which is told no prompts, wanted none, or a whole pipeline "
            "that takes prompts or class labels"
        )
    path = loaded.files.get(stated)
    if path is not None:
        _check(path, model, told)
    return loaded


def _check(path: Path, model: ModelRow, told: str) -> None:
    """Refuse a file that cannot be read, or says what the pipeline does not take."""
    try:
        lines = read_prompts(path.read_bytes(), str(path))
    except (InvalidInputError, OSError) as error:
        raise RecipeError(f"prompts: {error}") from error
    got = "class labels" if lines[0].prompt is None else "prompts"
    if (told == "prompt") != (got == "prompts"):
        wanted = "prompts" if told == "prompt" else "class labels, one number a line"
        raise RecipeError(f"prompts: got {got} in {path}, wanted {wanted}, which the pipeline of {model.name} takes")
    takes = model.inspection["pipeline"]["takes"]
    if lines[0].size is not None and not {"height", "width"} <= set(takes):
        raise RecipeError(
            f"prompts: got sizes in {path}, wanted none: the call of {model.name} takes no height and width"
        )
    labels = model.inspection["label_count"]
    wrong = [
        line.class_label for line in lines if line.class_label is not None and labels and line.class_label >= labels
    ]
    if wrong:
        raise RecipeError(f"prompts: got class label {wrong[0]} in {path}, wanted 0 to {labels - 1}")
