"""Which scheduler a recipe means for a model: the model's own, unless the recipe names one that fits."""

from __future__ import annotations

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.planning.pipeline import with_guidance
from quant_spec.recipe import Recipe
from quant_spec.scheduler_choice import SchedulerChoice, choose_scheduler, default_scheduler
from quant_spec.schedulers import TAKE_ETA, TAKE_SIGMAS, TAKE_TIMESTEPS


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
    own.

    Raises
    ------
    QuantizationError
        If the scheduler does not fit the model.
    RecipeError
        If the recipe sets a field that this scheduler does not read, timesteps or sigmas that it does not take, or a
        null class where nothing is guided.
    """
    choice, sampler = choice_for(model, recipe), with_guidance(recipe, model).sampler
    unread: dict[str, str] = {}
    if choice.name not in TAKE_ETA and sampler.eta:
        unread["eta"] = f"wanted 0: {choice.name} takes no share of DDPM's noise"
    if not choice.config.get("use_dynamic_shifting") and sampler.mu is not None:
        unread["mu"] = f"wanted null: {choice.name} as configured shifts by no resolution (use_dynamic_shifting)"
    if not sampler.is_guided and sampler.null_class is not None:
        unread["null_class"] = f"wanted null: guidance_scale {sampler.guidance_scale:g} calls nothing without a class"
    for name, wanted in unread.items():
        raise RecipeError(f"sampler.{name}: got {getattr(sampler, name)}, {wanted}")
    for name, takers in {"timesteps": TAKE_TIMESTEPS, "sigmas": TAKE_SIGMAS}.items():
        if sampler.arguments.get(name) is not None and choice.name not in takers:
            raise RecipeError(
                f"sampler.arguments.{name}: got some for {choice.name}, which sets its own, wanted none, or "
                f"sampler.scheduler among {', '.join(sorted(takers))}"
            )
    told = sampler.replaced(scheduler=choice.name)
    return recipe.model_copy(update={"sampler": told})  # a recipe that was checked stays one
