"""An allocation: what each layer of one model gets, as choices on top of a base recipe.

With its choices written into the recipe (`apply_allocation`), an allocation is a recipe like any other: exceptions that
name one layer exactly, and `passes.menu`, which rounds every layer at each width once.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from quant_spec.errors import InvalidInputError
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem
from quant_spec.passes.menu import Menu
from quant_spec.recipe import Recipe
from quant_spec.recipe_formats import ActivationsException, LayerException, WeightsException, exact_name
from quant_spec.record import Bits, Record, Share

_GLOB = re.compile(r"([*?[])")


class LayerChoice(Record):
    """What one layer, or one attention, gets; what is null is as the base recipe says."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"weight_bits", "promoted", "activation_bits", "keep"})

    weight_bits: Bits | None = Field(default=None, description="Bits of the weight.")
    promoted: Share = Field(
        default=0.0, description="Share of the output channels that get the menu's next width, those that gain most."
    )
    activation_bits: Bits | Annotated[tuple[Bits, ...], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Bits of the input: one width, or one for each equal range of trajectory steps."
    )
    keep: bool = Field(default=False, description="Keep in full precision.")

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        if self.keep and (self.weight_bits is not None or self.activation_bits is not None or self.promoted):
            raise ValueError("keep: got true beside bits, wanted one or the other")
        if self.promoted and self.weight_bits is None:
            raise ValueError(f"promoted: got {self.promoted:g} without weight_bits, wanted weight_bits")
        return self

    def exception(self, name: str) -> LayerException | None:
        """Return the choice as a recipe's exception for the layer `name`; None if it chooses nothing."""
        if self.keep:
            return LayerException(match=escaped(name), keep=True)
        weights: dict[str, Any] = {} if self.weight_bits is None else {"bits": self.weight_bits}
        if self.promoted:
            weights["promoted"] = self.promoted
        activations: dict[str, Any] = {}
        if isinstance(self.activation_bits, tuple):
            activations = {"range_bits": self.activation_bits}
        elif self.activation_bits is not None:
            activations = {"bits": self.activation_bits}
        if not weights and not activations:
            return None
        return LayerException(
            match=escaped(name),
            weights=WeightsException(**weights),
            activations=ActivationsException(**activations),
        )


class Allocation(Record):
    """What every layer of one model gets."""

    variant: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default="base", description="Which of the space's variants of the base recipe."
    )
    layers: dict[str, LayerChoice] = Field(
        default={}, description="Choices by the names of layers and attentions; others are as the base recipe says."
    )

    @property
    def digest(self) -> str:
        """Sha256 of the choices; layers that choose nothing do not count."""
        chosen = {name: told for name, choice in self.layers.items() if (told := choice.to_json())}
        return hashlib.sha256(canonical_json({"variant": self.variant, "layers": chosen}).encode()).hexdigest()


def escaped(name: str) -> str:
    """Return the pattern that matches this name alone."""
    return _GLOB.sub(r"[\1]", name)


def apply_allocation(recipe: Recipe, allocation: Allocation, menu: Menu) -> Recipe:
    """Write an allocation into its base recipe, that of its variant: exceptions by exact name, and `passes.menu`.

    The base's own `passes.choose` and `passes.exceptions` go: bits, and what stays in full precision, are the
    allocation's to say.

    Raises
    ------
    InvalidInputError
        If the recipe can't have them.
    """
    made = [choice.exception(name) for name, choice in sorted(allocation.layers.items())]
    layers = (*recipe.layers, *(entry for entry in made if entry is not None))
    try:
        return recipe.replaced(layers=layers, passes=recipe.passes.replaced(menu=menu, choose=None, exceptions=None))
    except ValidationError as error:
        raise InvalidInputError(first_problem(error, Recipe)) from None


def without_choices(recipe: Recipe) -> Recipe:
    """Return the recipe whose formats a menu is rounded in: without the bits that exact names are given.

    An exception that names one layer exactly chooses from the menu; patterns, `@first` and `@last` belong to the base.
    What an exact name says beside bits (granularity, ranges) says how it is rounded at every width, so it stays. The
    budget, which is for the bits that are chosen, does not.
    """
    kept = []
    for entry in recipe.layers:
        if exact_name(entry.match) is None:
            kept.append(entry)
            continue
        weights = _unchosen(entry.weights, {"bits", "promoted"})
        activations = _unchosen(entry.activations, {"bits", "range_bits"})
        if weights or activations:
            kept.append(
                LayerException(
                    match=entry.match,
                    weights=WeightsException(**weights),
                    activations=ActivationsException(**activations),
                    required=entry.required,
                )
            )
    return recipe.replaced(layers=tuple(kept), budget=type(recipe.budget)())


def _unchosen(partial: WeightsException | ActivationsException, chosen: set[str]) -> dict[str, Any]:
    """Return what a partial record states, but for these fields."""
    return {name: getattr(partial, name) for name in partial.model_fields_set - chosen}
