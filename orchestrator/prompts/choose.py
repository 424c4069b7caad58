"""Which prompts file a job's pipeline is told from, and whether the file and the pipeline fit each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.prompts.files import check_files
from orchestrator.recipes.load import LoadedRecipe
from quant_spec.errors import InvalidInputError
from quant_spec.pipeline import OWN_ARGUMENTS
from quant_spec.prompts import PromptLine, PromptPart, read_prompts, select_part
from quant_spec.recipe import Recipe

#: 256 neutral prompts, in no order.
NEUTRAL = Path(__file__).with_name("neutral.txt")


@cache
def neutral_digest() -> str:
    """Return the SHA-256 of the shipped prompts."""
    return hashlib.sha256(NEUTRAL.read_bytes()).hexdigest()


def told_by(model: ModelRow) -> str | None:
    """Return what a model's pipeline is told: "prompt", "class_labels", "files"; None for none of them."""
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
        if needs := (model.inspection.get("pipeline") or {}).get("needs"):
            raise RecipeError(
                f"prompts: got none for model {model.name}, wanted a prompts file (--prompts) with columns "
                f"{', '.join(needs)}, which the call of {model.inspection['pipeline']['class_name']} needs"
            )
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
    content = loaded.files.get(stated)
    if content is not None:
        _check(content, model, told, loaded.recipe)
    return loaded


def _check(content: Path | bytes, model: ModelRow, told: str, recipe: Recipe) -> None:
    """Refuse a file that cannot be read, or does not say what the pipeline takes."""
    path = content if isinstance(content, Path) else "the prompts file"
    try:
        lines = read_prompts(content.read_bytes() if isinstance(content, Path) else content, str(path))
    except (InvalidInputError, OSError) as error:
        raise RecipeError(f"prompts: {error}") from error
    line, pipeline = lines[0], model.inspection["pipeline"]
    got = "prompts" if line.prompt is not None else "files alone" if line.class_label is None else "class labels"
    wanted = {"prompt": "prompts", "class_labels": "class labels"}.get(told, "files alone")
    if got != wanted:
        form = "class labels, one number a line" if told == "class_labels" else wanted
        raise RecipeError(f"prompts: got {got} in {path}, wanted {form}, which the pipeline of {model.name} takes")
    columns = {name for name, _ in line.more}
    if unknown := sorted(columns - (set(pipeline["takes"]) - OWN_ARGUMENTS)):
        known = ", ".join(sorted(set(pipeline["takes"]) - OWN_ARGUMENTS))
        raise RecipeError(f"prompts: got columns {', '.join(unknown)} in {path}, wanted what its call takes: {known}")
    if missing := [name for name in pipeline.get("needs") or () if name not in columns]:
        raise RecipeError(
            f"prompts: got no column {', '.join(missing)} in {path}, wanted files for the call of "
            f"{pipeline['class_name']}, which needs {', '.join(pipeline['needs'])}"
        )
    if any(each.negative_prompt for each in lines) and "negative_prompt" not in pipeline["takes"]:
        raise RecipeError(
            f"prompts: got negative_prompt in {path}, wanted none: the call of {model.name} "
            f"({pipeline['class_name']}) takes none"
        )
    if line.size is not None and not {"height", "width"} <= set(pipeline["takes"]):
        raise RecipeError(
            f"prompts: got sizes in {path}, wanted none: the call of {model.name} takes no height and width"
        )
    _check_size(line, path, recipe.sampler.arguments)
    resized = {"height", "width"} <= set(pipeline["takes"])
    check_files(
        lines,
        str(path),
        any_size=resized and (line.size is not None or {"height", "width"} <= recipe.sampler.arguments.keys()),
        hint=", or --size, to which the pipeline brings all" if resized else "",
    )
    labels = model.inspection["label_count"]
    wrong = [
        line.class_label for line in lines if line.class_label is not None and labels and line.class_label >= labels
    ]
    if wrong:
        raise RecipeError(f"prompts: got class label {wrong[0]} in {path}, wanted 0 to {labels - 1}")


def _check_size(line: PromptLine, path: Path | str, arguments: Mapping[str, Any]) -> None:
    """Refuse a size of the prompts file beside another of the recipe or the command line."""
    asked = tuple(arguments.get(name) for name in ("height", "width"))
    if line.size is not None and any(one not in (None, own) for one, own in zip(asked, line.size, strict=True)):
        got, own = ("x".join(str(side) for side in size) for size in (asked, line.size))
        raise RecipeError(f"prompts: got size {own} in {path}, and {got} besides (--size), wanted one of them")


def notify_repeated(loaded: LoadedRecipe, notify: Callable[[str], None]) -> None:
    """Say how many of the lines that a job is measured on are among those that it is calibrated with, or count twice.

    Class labels, and a single line, are used by both, as they are all that there is. Lines with seeds of their own draw
    the same samples again where there are fewer than are measured.
    """
    content = None if loaded.recipe.prompts is None else loaded.files.get(loaded.recipe.prompts)
    if content is None or content == NEUTRAL:
        return
    lines = read_prompts(content.read_bytes() if isinstance(content, Path) else content)
    told, seeds = select_part(lines, PromptPart.EVALUATION), loaded.recipe.evaluation.seeds
    if seeds > len(told) and any(line.seed is not None for line in told):
        notify(
            f"prompts: {len(told)} lines with seeds of their own are measured on {seeds} times, so that samples count "
            f"more than once; evaluation.seeds={len(told)} counts each once"
        )
    if len(lines) == 1 or lines[0].class_label is not None:
        return
    fitted, measured = (
        [(line.prompt, line.negative_prompt, line.more) for line in select_part(lines, part)] for part in PromptPart
    )
    known = set(fitted)
    both = sum(each in known for each in measured)
    if both:
        notify(f"prompts: {both} of {len(measured)} lines that are measured on are among those that calibrate, too")
