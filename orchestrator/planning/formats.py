"""Decide the format of every layer: the recipe's defaults, then the exceptions whose pattern matches, in order.

The result is the JSON that task bodies read (`quant_spec.formats.LayerSpec` and `AttentionSpec`, with the ranges
beside).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.planning.model import LayerInfo, ModelInfo, UnitInfo
from quant_spec.messages import nearest
from quant_spec.recipe import Recipe
from quant_spec.recipe_formats import Activations, LayerException, Weights, activations_for, weights_for

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """A unit of which something is quantized; `layers` and `attentions` map names to their format as JSON."""

    unit: UnitInfo
    layers: Mapping[str, Any]
    attentions: Mapping[str, Any]

    def parameters(self) -> dict[str, Any]:
        """Return what task bodies are told about the unit."""
        return {"unit": self.unit.name, "layers": dict(self.layers), "attentions": dict(self.attentions)}


def varied_layers(plans: Sequence[UnitPlan]) -> dict[str, dict[str, Any]]:
    """Return what is known of each layer whose activation bits are chosen for each step (null in its format)."""
    return {
        name: {
            "symmetric": layer["activation"]["symmetric"],
            "range": layer["activation_range"],
            "split": layer["split"],
        }
        for plan in plans
        for name, layer in plan.layers.items()
        if layer["activation"] is not None and layer["activation"]["bits"] is None
    }


def allocated_layers(plans: Sequence[UnitPlan]) -> list[str]:
    """Return the layers whose output channels have bits of their own."""
    return [name for plan in plans for name, layer in plan.layers.items() if "allocated" in layer]


def plan_formats(model: ModelInfo, recipe: Recipe) -> list[UnitPlan]:
    """Return the units to quantize, in the order in which they run; what is kept in full precision is not in them.

    Raises
    ------
    RecipeError
        If nothing is left to quantize, an exception's pattern matches nothing, exceptions contradict each other, or the
        bits exceed the recipe's budget.
    """
    rules = _Rules(model, recipe)
    plans = [plan for unit in model.units if (plan := rules.unit(unit)).layers or plan.attentions]
    rules.check_used()
    if not plans:
        raise RecipeError("layers: got every layer kept in full precision, wanted at least one to quantize")
    extra = recipe.passes.allocate.extra if recipe.passes.allocate is not None else 0.0
    _check_budget(model, plans, recipe.budget.weight_bits_mean, extra)
    return plans


def weight_bits_mean(model: ModelInfo, plans: Sequence[UnitPlan], extra: float = 0.0) -> float:
    """Return the mean bits of a weight over all Conv and Linear layers; what no plan names has 32.

    `extra`: the share of the channels of allocated layers that get one more bit.
    """
    bits = {
        name: layer["weight"]["bits"] + (extra if "allocated" in layer else 0.0)
        for plan in plans
        for name, layer in plan.layers.items()
    }
    total = sum(layer.weights * bits.get(layer.name, FLOAT_BITS) for layer in model.layers)
    return float(total / sum(layer.weights for layer in model.layers))


def _check_budget(model: ModelInfo, plans: Sequence[UnitPlan], budget: float | None, extra: float) -> None:
    """Refuse bits that cost more than allowed; a recipe fixes each layer's, so theirs is the smallest budget."""
    if budget is None:
        return
    smallest = weight_bits_mean(model, plans, extra)
    if smallest > budget:
        raise RecipeError(
            f"budget.weight_bits_mean: got {budget:g}, wanted at least {math.ceil(smallest * 1000) / 1000:g} (the "
            "smallest that this recipe's bits can meet on this model)"
        )


class _Rules:
    """A recipe's exceptions, made ready for one model."""

    def __init__(self, model: ModelInfo, recipe: Recipe) -> None:
        self.recipe = recipe
        self.names = [layer.name for layer in model.layers] + [n for unit in model.units for n in unit.attentions]
        ends = {"@first": model.first_layer, "@last": model.last_layer}
        self.patterns = [
            re.compile(re.escape(ends[e.match]) if e.match in ends else fnmatch.translate(e.match))
            for e in recipe.layers
        ]
        self.used: set[int] = set()
        self.formats: dict[tuple[int, ...], tuple[Weights, Activations]] = {}  # by the exceptions that match

    def matches(self, name: str) -> tuple[int, ...]:
        """Return the places of the exceptions that match a name."""
        places = tuple(place for place, pattern in enumerate(self.patterns) if pattern.fullmatch(name))
        self.used.update(places)
        return places

    def keeps(self, places: Collection[int]) -> bool:
        """Return what the last of these exceptions says about full precision."""
        return bool(places) and self.recipe.layers[max(places)].keep

    def unit(self, unit: UnitInfo) -> UnitPlan:
        """Decide the formats of one unit."""
        layers = {layer.name: self.layer(layer) for layer in unit.layers}
        quantized = {name: data for name, data in layers.items() if data is not None}
        attentions = {name: self.attention(name, layers) for name in unit.attentions}
        return UnitPlan(unit, quantized, {name: data for name, data in attentions.items() if data is not None})

    def layer(self, layer: LayerInfo) -> dict[str, Any] | None:
        """Decide the format of one layer; None keeps it."""
        places = self.matches(layer.name)
        if self.keeps(places):
            return None
        weights, activations = self.format(places, layer.name)
        quantized = activations.bits is not None
        bits = None if self.varies(places, activations) else activations.bits
        allocated = {"allocated": True} if self.allocates(places, weights) else {}
        return allocated | {
            "weight": weights.model_dump(include={"bits", "symmetric", "granularity", "group_size"}),
            "weight_range": _range(weights),
            "activation": _activation(activations, bits) if quantized else None,
            "activation_range": _range(activations) if quantized and not activations.is_dynamic else None,
            "split": list(layer.split) if layer.split and self.recipe.skip_split else None,
        }

    def varies(self, places: Collection[int], activations: Activations) -> bool:
        """Whether the activation bits are those chosen for each trajectory step: unless an exception gives others."""
        stated = any("bits" in self.recipe.layers[place].activations.model_fields_set for place in places)
        return self.recipe.activations.step_bits is not None and activations.mode == "per_step" and not stated

    def allocates(self, places: Collection[int], weights: Weights) -> bool:
        """Whether the layer's channels have bits of their own: unless an exception gives bits, or shared scales."""
        allocate = self.recipe.passes.allocate
        stated = any("bits" in self.recipe.layers[place].weights.model_fields_set for place in places)
        chosen = allocate is not None and allocate.method != "uniform"
        return chosen and weights.granularity == "per_channel" and not stated

    def attention(self, name: str, layers: Mapping[str, Any]) -> dict[str, Any] | None:
        """Decide the format of one attention's matmuls; None keeps them, as where all its own layers are kept."""
        attention, activations = self.recipe.attention, self.recipe.activations
        own = [data for layer, data in layers.items() if layer.startswith(f"{name}.")]
        kept = self.keeps(self.matches(name)) or (own and not any(own))
        if kept or not attention.enabled or activations.bits is None:
            return None
        return {
            "activation": _activation(activations, attention.bits),
            "activation_range": None if activations.is_dynamic else _range(activations),
            "softmax_bits": attention.softmax_bits,
        }

    def format(self, places: tuple[int, ...], name: str) -> tuple[Weights, Activations]:
        """Return the formats of the layers that these exceptions match."""
        if places not in self.formats:
            entries: list[LayerException] = [self.recipe.layers[place] for place in places]
            try:
                weights = weights_for(self.recipe.weights, entries, f"layer {name}: weights")
                activations = activations_for(self.recipe.activations, entries, f"layer {name}: activations")
            except ValueError as error:
                raise RecipeError(str(error)) from error
            self.formats[places] = weights, activations
        return self.formats[places]

    def check_used(self) -> None:
        """Refuse an exception that is meant for some layer and matches none."""
        for place, entry in enumerate(self.recipe.layers):
            if entry.required and place not in self.used:
                raise RecipeError(
                    f"layers.{place}.match: got {entry.match!r}, wanted a pattern that matches a layer of the model"
                    f"{nearest(entry.match, self.names[:1000]) if self.names else ''}"
                )


def _range(section: Weights | Activations) -> dict[str, Any]:
    """Return how a range is found, without what that method does not use."""
    if section.range == "percentile":
        return {"method": section.range, "percentile": section.percentile}
    return {"method": section.range}


def _activation(activations: Activations, bits: int | None) -> dict[str, Any]:
    return {"bits": bits, "symmetric": activations.symmetric, "mode": activations.mode}
