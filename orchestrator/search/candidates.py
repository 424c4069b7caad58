"""From an allocation to the recipe that measures it: at few seeds, or with the recipe's whole evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.recipes.load import recipe_from_json
from quant_spec.allocation import Allocation, apply_allocation
from quant_spec.passes.menu import Menu
from quant_spec.recipe import Budget, Recipe
from quant_spec.record import Bits
from quant_spec.search import Screening, SearchSpec

#: Digits of an allocation's digest in the name of its recipe.
_NAME_DIGITS = 8


def menu_of(spec: SearchSpec) -> Menu:
    """Return the widths that a search's candidates choose from."""
    activation_bits: Sequence[Bits] = spec.space.activation_bits
    return Menu(weight_bits=spec.space.weight_bits, activation_bits=tuple(activation_bits))


def candidate(spec: SearchSpec, recipes: Mapping[str, Recipe], allocation: Allocation) -> Recipe:
    """Return the recipe of an allocation, with the whole evaluation; what chooses nothing is its variant as it is.

    Raises
    ------
    ValueError
        If the variant can't have these choices.
    """
    base = recipes[allocation.variant]
    name = f"{spec.name}-{allocation.digest[:_NAME_DIGITS]}"
    base = base.replaced(name=name, description=f"of the search {spec.name}", budget=Budget())
    return apply_allocation(base, allocation, menu_of(spec)) if allocation.layers else base


def screened(recipe: Recipe, screening: Screening) -> Recipe:
    """Return a recipe with the evaluation of the first measurement: few samples, on seeds of its own."""
    seeds = screening.seeds
    evaluation = recipe.evaluation.replaced(
        seeds=seeds,
        first_seed=screening.first_seed,
        batch_size=screening.batch_size,
        shard_seeds=max(seeds, recipe.evaluation.shard_seeds),
        sqnr_seeds=min(seeds, recipe.evaluation.sqnr_seeds),
        grid=min(seeds, recipe.evaluation.grid),
    )
    return recipe.replaced(evaluation=evaluation)


def recipes_of(values: Mapping[str, object]) -> dict[str, Recipe]:
    """Read the recipes that a search's row holds."""
    return {name: recipe_from_json(value) for name, value in values.items() if isinstance(value, Mapping)}
