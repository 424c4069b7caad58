"""Decide the format of every layer: the recipe's defaults, then the exceptions whose pattern matches, in order."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.errors import RecipeError
from orchestrator.planning.model import LayerInfo, ModelInfo, UnitInfo
from quant_spec.enums import Granularity, GroupScale, NumberType, RangeMethod
from quant_spec.formats import MULTIPLIED_BITS, WeightSpec, softmax_bits
from quant_spec.messages import nearest
from quant_spec.planned import PlannedActivation, PlannedAttention, PlannedLayer, PlannedUnit, VariedLayer
from quant_spec.ranges import RangeSpec
from quant_spec.recipe import Recipe
from quant_spec.recipe_formats import (
    Activations,
    LayerException,
    Weights,
    activations_for,
    exact_name,
    weights_for,
)

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class QuantizedUnit:
    """A unit of which something is quantized: what the model says of it, and what its tasks are told.

    `promoted` and `range_bits` have what some layers choose from a menu beside their bits (see `LayerException`).
    `changing` are layers that may read differences between steps, or whose bits at each step may be chosen.
    """

    info: UnitInfo
    planned: PlannedUnit
    promoted: Mapping[str, float] = field(default_factory=dict)
    range_bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    changing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the unit."""
        return self.info.name

    def without(self, layers: Collection[str]) -> QuantizedUnit:
        """Return the unit with some of its layers left in full precision; it still runs them."""
        left = {name: layer for name, layer in self.planned.layers.items() if name not in layers}
        changing = tuple(name for name in self.changing if name not in layers)
        return replace(self, planned=replace(self.planned, layers=left), changing=changing)


def varied_layers(units: Iterable[QuantizedUnit]) -> dict[str, VariedLayer]:
    """Return the layers whose activation bits are chosen for each trajectory step."""
    return {
        name: VariedLayer(layer.activation.symmetric, layer.activation_range, layer.split)
        for unit in units
        for name, layer in unit.planned.layers.items()
        if layer.has_open_bits and layer.activation is not None and layer.activation_range is not None
    }


def allocated_layers(units: Iterable[QuantizedUnit]) -> tuple[str, ...]:
    """Return the layers whose output channels have bits of their own."""
    return tuple(name for unit in units for name, layer in unit.planned.layers.items() if layer.allocated)


def weights_alone(weights: Weights) -> PlannedLayer:
    """Return a layer whose weights are in a format, and whose input is not quantized."""
    spec = WeightSpec(weights.bits, weights.symmetric, weights.granularity, weights.group_size, type=weights.type)
    if weights.granularity is Granularity.PER_GROUP and weights.group_scale is GroupScale.INTEGER:
        narrow = replace(spec, bits=min(weights.bits, MULTIPLIED_BITS), group_scale=GroupScale.INTEGER)
        spec = narrow.with_bits(weights.bits)
    return PlannedLayer(weight=spec, weight_range=_range(weights))


def choose_formats(model: ModelInfo, recipe: Recipe) -> list[QuantizedUnit]:
    """Return the units to quantize, in the order in which they run; what is kept in full precision is not in them.

    Raises
    ------
    RecipeError
        If nothing is left to quantize, an exception's pattern matches nothing, exceptions contradict each other, or the
        bits exceed the recipe's budget.
    """
    rules = _Rules(model, recipe)
    planned = [(unit, rules.unit(unit)) for unit in model.units]
    units = [
        QuantizedUnit(unit, formats, *rules.menu_choices(formats), rules.changing(formats))
        for unit, formats in planned
        if formats.layers or formats.attentions
    ]
    rules.check_used()
    if not units:
        raise RecipeError("layers: got every layer kept in full precision, wanted at least one to quantize")
    extra = recipe.passes.allocate.extra if recipe.passes.allocate is not None else 0.0
    widths = () if recipe.passes.menu is None else recipe.passes.menu.weight_bits
    _check_budget(recipe.budget.weight_bits_mean, weight_bits_mean(model, units, extra, widths))
    return units


def weight_bits_mean(
    model: ModelInfo, units: Sequence[QuantizedUnit], extra: float = 0.0, widths: Sequence[int] = ()
) -> float:
    """Return the mean bits of a weight over all Conv and Linear layers; a layer that is not quantized has 32.

    `extra`: the share of the channels of allocated layers that get one more bit. `widths`: those of the menu, of which
    promoted channels get the next.
    """
    bits: dict[str, float] = {}
    for unit in units:
        for name, layer in unit.planned.layers.items():
            own = layer.weight.bits
            above = min((width for width in widths if width > own), default=own)
            bits[name] = own + (extra if layer.allocated else 0.0) + unit.promoted.get(name, 0.0) * (above - own)
    total = sum(layer.weights * bits.get(layer.name, FLOAT_BITS) for layer in model.layers)
    return float(total / sum(layer.weights for layer in model.layers))


def _check_budget(budget: float | None, smallest: float) -> None:
    """Refuse bits that cost more than allowed; a recipe fixes each layer's, so theirs is the smallest budget."""
    if budget is not None and smallest > budget:
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
        self.patterns: list[tuple[int, re.Pattern[str]]] = []
        self.exact: dict[str, list[int]] = {}  # by name, as there may be an exception for each of thousands of layers
        for place, entry in enumerate(recipe.layers):
            name = ends.get(entry.match) or exact_name(entry.match)
            if name is None:
                self.patterns.append((place, re.compile(fnmatch.translate(entry.match))))
            else:
                self.exact.setdefault(name, []).append(place)
        self.used: set[int] = set()
        self.formats: dict[tuple[int, ...], tuple[Weights, Activations]] = {}  # by the exceptions that match

    def matches(self, name: str) -> tuple[int, ...]:
        """Return the places of the exceptions that match a name."""
        matching = [place for place, pattern in self.patterns if pattern.fullmatch(name)]
        places = tuple(sorted([*matching, *self.exact.get(name, ())]))
        self.used.update(places)
        return places

    def menu_choices(self, unit: PlannedUnit) -> tuple[dict[str, float], dict[str, tuple[int, ...]]]:
        """Return the shares of promoted channels, and the bits by range of steps, that exact names are given."""
        promoted: dict[str, float] = {}
        ranges: dict[str, tuple[int, ...]] = {}
        for name in (*unit.layers, *unit.attentions):
            for place in self.exact.get(name, ()):
                entry = self.recipe.layers[place]
                if entry.weights.model_fields_set & {"bits", "promoted"}:
                    promoted[name] = entry.weights.promoted or 0.0
                if entry.activations.model_fields_set & {"bits", "range_bits"}:
                    ranges[name] = entry.activations.range_bits or ()
        return {n: share for n, share in promoted.items() if share}, {n: bits for n, bits in ranges.items() if bits}

    def keeps(self, places: Collection[int]) -> bool:
        """Return what the last of these exceptions says about full precision."""
        return bool(places) and self.recipe.layers[max(places)].keep

    def unit(self, unit: UnitInfo) -> PlannedUnit:
        """Decide the formats of one unit."""
        layers = {layer.name: self.layer(layer) for layer in unit.layers}
        attentions = {name: self.attention(name, layers) for name in unit.attentions}
        return PlannedUnit(
            unit.name,
            {name: layer for name, layer in layers.items() if layer is not None},
            {name: attention for name, attention in attentions.items() if attention is not None},
        )

    def layer(self, layer: LayerInfo) -> PlannedLayer | None:
        """Decide the format of one layer; None keeps it."""
        places = self.matches(layer.name)
        if self.keeps(places):
            return None
        weights, activations = self.format(places, layer.name)
        quantized = activations.bits is not None
        bits = None if self.varies(places, activations) else activations.bits
        return replace(
            weights_alone(weights),
            activation=_activation(activations, bits) if quantized else None,
            activation_range=_range(activations) if quantized and not activations.is_dynamic else None,
            split=layer.split if layer.split and self.recipe.skip_split else None,
            allocated=self.allocates(places, weights),
        )

    def varies(self, places: Collection[int], activations: Activations) -> bool:
        """Whether the activation bits are those chosen for each trajectory step: unless an exception gives others."""
        stated = any("bits" in self.recipe.layers[place].activations.model_fields_set for place in places)
        return self.recipe.activations.step_bits is not None and activations.mode == "per_step" and not stated

    def changing(self, unit: PlannedUnit) -> tuple[str, ...]:
        """Return the layers that may read differences between steps, or whose bits at each step may be chosen.

        Those are all whose bits no exception gives.
        """
        exceptions = self.recipe.passes.exceptions
        if self.recipe.passes.differences is None and (exceptions is None or not exceptions.choices):
            return ()
        found = []
        for name, layer in unit.layers.items():
            entries = [self.recipe.layers[at].activations for at in self.matches(name)]
            fields = {field for entry in entries for field in entry.model_fields_set}
            stated, activation = bool({"bits", "range_bits"} & fields), layer.activation
            if activation is None or stated or activation.mode != "per_step" or activation.type is NumberType.E4M3:
                continue
            found.append(name)
        return tuple(found)

    def allocates(self, places: Collection[int], weights: Weights) -> bool:
        """Whether the layer's channels have bits of their own: unless an exception gives bits, or shared scales."""
        allocate = self.recipe.passes.allocate
        stated = any("bits" in self.recipe.layers[place].weights.model_fields_set for place in places)
        chosen = allocate is not None and not allocate.is_uniform
        return chosen and weights.granularity is Granularity.PER_CHANNEL and not stated

    def attention(self, name: str, layers: Mapping[str, PlannedLayer | None]) -> PlannedAttention | None:
        """Decide the format of one attention's matmuls; None keeps them, as where all its own layers are kept."""
        attention, activations = self.recipe.attention, self.recipe.activations
        own = [planned for layer, planned in layers.items() if layer.startswith(f"{name}.")]
        kept = self.keeps(self.matches(name)) or (own and all(planned is None for planned in own))
        if kept or not attention.enabled or activations.bits is None:
            return None
        activations = activations.replaced(mode=self.recipe.modes["attention.mode"])
        bits = self.attention_bits(name)
        return PlannedAttention(
            _activation(activations, attention.bits if bits is None else bits),
            None if activations.is_dynamic else _range(activations),
            attention.softmax_bits if bits is None else softmax_bits(attention.softmax_bits, bits),
        )

    def attention_bits(self, name: str) -> int | None:
        """Return the bits that an exception gives to this very attention: of its query, key, value and probabilities.

        Patterns speak of the inputs of layers, among which those of an attention's own.
        """
        bits: int | None = None
        for place in self.exact.get(name, ()):
            activations = self.recipe.layers[place].activations
            if "bits" in activations.model_fields_set:
                bits = activations.bits
            if activations.range_bits:
                mode = self.recipe.modes["attention.mode"]
                if mode != "per_step":
                    raise RecipeError(
                        f"attention {name}: activations.range_bits: got attention.mode {mode}, wanted per_step"
                    )
                bits = max(activations.range_bits)
        return bits

    def format(self, places: tuple[int, ...], name: str) -> tuple[Weights, Activations]:
        """Return the formats of the layers that these exceptions match."""
        if places not in self.formats:
            entries: list[LayerException] = [self.recipe.layers[place] for place in places]
            try:
                weights = weights_for(self.recipe.weights, entries, f"layer {name}: weights")
                activations = activations_for(self.recipe.activations, entries, f"layer {name}: activations")
            except ValueError as error:
                raise RecipeError(str(error)) from error
            for entry in entries:
                if entry.activations.range_bits and activations.bits is not None:
                    activations = activations.replaced(bits=max(entry.activations.range_bits))
                elif "bits" in entry.activations.model_fields_set and activations.bits is not None:
                    activations = activations.replaced(bits=entry.activations.bits)
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


def _range(section: Weights | Activations) -> RangeSpec:
    """Return how a range is found; a percentile stays the default where it is not used."""
    if section.range is RangeMethod.PERCENTILE:
        return RangeSpec(section.range, section.percentile)
    return RangeSpec(section.range)


def _activation(activations: Activations, bits: int | None) -> PlannedActivation:
    return PlannedActivation(bits, activations.symmetric, activations.mode, activations.type)
