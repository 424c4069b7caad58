"""Whether a whole pipeline can do what a recipe asks for, before anything runs: its inspection knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from quant_spec.enums import SampleSpace
from quant_spec.pipeline import OWN_ARGUMENTS
from quant_spec.recipe import Recipe


def pipeline_of(model: ModelRow) -> Mapping[str, Any] | None:
    """Return what the inspection says of a model's pipeline; None for a bare denoiser."""
    found: Mapping[str, Any] | None = model.inspection.get("pipeline")
    return found


def default_guidance(model: ModelRow) -> float:
    """Return the guidance of a recipe that states none: the default of the pipeline's call, 1 if it has none."""
    stated = (pipeline_of(model) or {}).get("guidance_scale")
    return 1.0 if stated is None else float(stated)


def with_guidance(recipe: Recipe, model: ModelRow) -> Recipe:
    """Return a recipe that states its guidance, as jobs and releases tell it."""
    if recipe.sampler.guidance_scale is not None:
        return recipe
    sampler = recipe.sampler.replaced(guidance_scale=default_guidance(model))
    return recipe.model_copy(update={"sampler": sampler})  # a recipe that was checked stays one


def check_pipeline(model: ModelRow, recipe: Recipe) -> None:
    """Refuse what a model's pipeline cannot do, and what only pipelines can for a bare denoiser.

    Raises
    ------
    RecipeError
        Naming what is missing.
    """
    pipeline, sampler = pipeline_of(model), recipe.sampler
    _check_clip(model, recipe)
    _check_lpips(model, recipe)
    if pipeline is None:
        if sampler.arguments:
            raise RecipeError(
                f"sampler.arguments: got {', '.join(sampler.arguments)} for model {model.name}, a bare denoiser, "
                "wanted none, or a whole pipeline"
            )
        return
    name = f"model {model.name} ({pipeline['class_name']})"
    if pipeline["problem"] is not None:
        raise RecipeError(
            f"{name}: {pipeline['problem']}; wanted a pipeline that can be called with prompts or class labels"
        )
    if (
        sampler.guidance_scale is not None
        and pipeline["guidance_scale"] is None
        and "guidance_scale" not in pipeline["takes"]
    ):
        raise RecipeError(f"sampler.guidance_scale: got {sampler.guidance_scale:g} for {name}, whose call takes none")
    for field in ("null_class", "mu"):
        if getattr(sampler, field) is not None:
            raise RecipeError(
                f"sampler.{field}: got {getattr(sampler, field)} for {name}, wanted null: its call decides it"
            )
    if sampler.timestep_scale != 1.0:
        raise RecipeError(
            f"sampler.timestep_scale: got {sampler.timestep_scale:g} for {name}, wanted 1: its call decides it"
        )
    if own := sorted(sampler.arguments.keys() & OWN_ARGUMENTS):
        raise RecipeError(
            f"sampler.arguments: got {', '.join(own)}, wanted the recipe's own field, or the prompts file"
        )
    if unknown := sorted(sampler.arguments.keys() - set(pipeline["takes"])):
        known = ", ".join(sorted(set(pipeline["takes"]) - OWN_ARGUMENTS)) or "nothing besides the recipe's own fields"
        raise RecipeError(f"sampler.arguments: got {', '.join(unknown)}, wanted what the call of {name} takes: {known}")


def _check_lpips(model: ModelRow, recipe: Recipe) -> None:
    """Refuse a model for the LPIPS whose samples are no images."""
    samples = model.inspection["samples"]
    if recipe.evaluation.lpips is not None and samples != SampleSpace.PIXELS:
        raise RecipeError(
            f"evaluation.lpips: got a model for {model.name}, whose samples are {samples}, wanted null, or a model of "
            "pixels"
        )


def _check_clip(model: ModelRow, recipe: Recipe) -> None:
    """Refuse a model for the CLIP score where there are no prompts."""
    if recipe.evaluation.clip is not None and (pipeline_of(model) or {}).get("prompts") != "prompt":
        raise RecipeError(
            f"evaluation.clip: got a model for {model.name}, whose samples have no prompts, wanted null, or a pipeline "
            "that is told prompts"
        )
