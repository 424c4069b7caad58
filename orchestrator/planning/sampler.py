"""Which scheduler a recipe means for a model: the model's own, unless the recipe names one that fits."""

from __future__ import annotations

from orchestrator.db.rows import ModelRow
from quant_spec.recipe import Recipe
from quant_spec.scheduler_choice import SchedulerChoice, choose_scheduler, default_scheduler


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
    """Return the recipe with the scheduler named, as tasks are told it: null means another class for every model."""
    named = recipe.sampler.replaced(scheduler=choice_for(model, recipe).name)
    return recipe.model_copy(update={"sampler": named})  # a recipe that was checked stays one
