"""Which scheduler a recipe means for a model: the model's own, unless the recipe names one that fits."""

from __future__ import annotations

from typing import Any

from orchestrator.db.rows import ModelRow
from orchestrator.planning.pipeline import with_guidance
from quant_spec.recipe import Recipe
from quant_spec.scheduler_choice import SchedulerChoice, choose_scheduler, default_scheduler
from quant_spec.schedulers import TAKE_ETA


def choice_for(model: ModelRow, recipe: Recipe) -> SchedulerChoice:
    """Choose the scheduler that samples are drawn with.

    Raises
    ------
    QuantizationError
        If the recipe's does not fit the model, or it names none and the model has none.
    """
    own, sampler = model.inspection["scheduler"], recipe.sampler
    return choose_scheduler(sampler.scheduler or default_scheduler(own), own, sampler.options)


def with_scheduler(recipe: Recipe, model: ModelRow) -> Recipe:
    """Return the recipe with the sampler as tasks are told it.

    Its scheduler is named, as null means another class for every model, and its guidance, as null means a pipeline's
    own; fields that this scheduler does not read, and
    the null class where nothing is guided, have their defaults, so that recipes which differ only there share their
    tasks.
    """
    choice, sampler = choice_for(model, recipe), with_guidance(recipe, model).sampler
    idle: dict[str, Any] = {"eta": 0.0} if choice.name not in TAKE_ETA else {}
    idle |= {} if choice.config.get("use_dynamic_shifting") else {"mu": None}
    idle |= {} if sampler.is_guided else {"null_class": None}
    told = sampler.replaced(scheduler=choice.name, **idle)
    return recipe.model_copy(update={"sampler": told})  # a recipe that was checked stays one
