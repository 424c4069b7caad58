"""The space of one model's choices: what each choice of each layer costs of each limit, as a knapsack.

A layer's choice is of its weight and of its inputs at each range of trajectory steps. Damages add up. Bit operations,
milliseconds and bytes belong to a weight and an input together, so all combinations are listed; of a layer with several
ranges of steps those that another beats in everything are left out range by range, which loses no optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quant_core.search.knapsack import Choices
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.errors import InvalidInputError
from quant_spec.search import LIMITS, SearchBudget

FLOAT_BITS = 32
KEEP = "keep"
#: Places of the limits in `Option.uses`.
PLACES = {name: place for place, name in enumerate(LIMITS)}
BYTES = PLACES["bytes"]
Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a table does not say: whether full precision is a choice, the base recipe's bits where nothing is chosen,
    latencies, memory of activations.
    """

    keep: bool = False
    base: Mapping[str, LayerChoice] = field(default_factory=dict)
    activation_bits: int | None = 8
    latency: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency_rest_ms: float = 0.0
    activation_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of an item.

    Attributes
    ----------
    weights : str or None
        Key in the table ("4", "4+0.5"), `keep`, or None where the item has no weights.
    activations : tuple of str
        Key for each range of steps; empty where nothing is chosen.
    damage : float
    uses : tuple of float
        Of each limit, by `PLACES`; of mean bits the bits of all weights.
    """

    weights: str | None
    activations: tuple[str, ...]
    damage: float
    uses: tuple[float, ...]

    def plus(self, other: Option) -> Option:
        """Return both together, under this one's keys."""
        uses = tuple(a + b for a, b in zip(self.uses, other.uses, strict=True))
        return Option(
            self.weights or other.weights, self.activations or other.activations, self.damage + other.damage, uses
        )


@dataclass(frozen=True, slots=True)
class Space:
    """All items of a model, each some layers that share a choice, and the knapsack over their options.

    `weights` counts all weights, which mean bits are taken over; `base` is what no choice changes of each limit.
    """

    names: tuple[tuple[str, ...], ...]
    options: tuple[tuple[Option, ...], ...]
    choices: Choices
    weights: int
    base: tuple[float, ...]
    table: Table

    def limits(self, budget: SearchBudget) -> list[float]:
        """Return a budget as limits of the knapsack; inf where there is none."""
        stated = budget.limits()
        found = [stated.get(name, np.inf) for name in LIMITS]
        found[PLACES["weight_bits_mean"]] *= self.weights
        return [limit - base for limit, base in zip(found, self.base, strict=True)]

    def reach(self) -> dict[str, tuple[float, float]]:
        """Return the smallest and largest that can be reached of each limit alone."""
        scale = np.ones(len(LIMITS))
        scale[PLACES["weight_bits_mean"]] = 1 / max(self.weights, 1)
        low, high = ((bound + np.array(self.base)) * scale for bound in (self.choices.least(), self.choices.most()))
        return {name: (float(low[place]), float(high[place])) for name, place in PLACES.items()}

    def allocation(self, variant: str, places: Sequence[int]) -> Allocation:
        """Return chosen options as an allocation; layers that have no choice say nothing."""
        flat = [option for own in self.options for option in own]
        layers = {
            name: choice
            for names, place in zip(self.names, places, strict=True)
            for name in names
            if (choice := _choice(self.table["layers"][name], flat[place])) != LayerChoice()
        }
        return Allocation(variant=variant, layers=layers)


def build_space(table: Table, costs: Costs, *, per_unit: bool = False, limited: Sequence[str] = LIMITS) -> Space:
    """List the options of all layers, or of all units, whose layers then share a choice.

    Parameters
    ----------
    table
        Of all groups, as `quant_spec.tasks.sensitivity` describes it.
    costs
        What the table does not say.
    limited
        The limits that count: options that another beats in damage, bytes and these are left out.
    """
    layers = table["layers"]
    owned: dict[str, list[str]] = {}
    for name in layers:
        owned.setdefault(table["unit"][name] if per_unit else name, []).append(name)
    counted = sorted({BYTES, *(PLACES[name] for name in limited)})
    items = [
        [layer_options(name, layers[name], costs, prune=not per_unit) for name in names] for names in owned.values()
    ]
    options = tuple(tuple(_undominated(_tied(own), counted)) for own in items)
    flat = [option for own in options for option in own]
    choices = Choices(
        np.repeat(np.arange(len(options)), [len(own) for own in options]),
        np.array([option.damage for option in flat]),
        np.array([option.uses for option in flat]).T.reshape(len(LIMITS), len(flat)),
    )
    base = {"bytes": table["base_bytes"], "latency_ms": costs.latency_rest_ms}
    base["memory_bytes"] = table["base_bytes"] + costs.activation_bytes
    return Space(
        names=tuple(tuple(names) for names in owned.values()),
        options=options,
        choices=choices,
        weights=sum(entry["parameters"] for entry in layers.values()),
        base=tuple(float(base.get(name, 0)) for name in LIMITS),
        table=table,
    )


def layer_options(name: str, entry: Mapping[str, Any], costs: Costs, *, prune: bool) -> list[Option]:
    """Return all choices of one layer or attention, but for combinations over ranges that others beat."""
    use = usage(name, entry, costs)
    found: list[Option] = []
    for key, cost in entry["weights"].items():
        own = Option(key, (), cost["damage"], use(key, None, cost["bytes"]))
        found += _with_activations(own, entry, use, prune)
    if not entry["weights"]:
        found = _with_activations(Option(None, (), 0.0, use(None, None, 0)), entry, use, prune)
    if costs.keep and len(entry["weights"]) > 1:
        kept = entry["keep"]
        found.append(Option(KEEP, (), kept["damage"], use(KEEP, None, kept["bytes"])))
    return found


def _with_activations(own: Option, entry: Mapping[str, Any], use: _Use, prune: bool) -> list[Option]:
    """Combine a weight with each choice of its inputs, range by range."""
    activations = entry["activations"]
    if len(activations) < 2:
        return [own] if not activations else [_one_range(own, next(iter(activations)), entry, use)]
    ranges = len(next(iter(activations.values())))
    base = use(own.weights, None, 0)
    partial = [Option(own.weights, (), own.damage, tuple(a - b for a, b in zip(own.uses, base, strict=True)))]
    for place in range(ranges):
        grown = []
        for option in partial:
            for key, damages in activations.items():
                uses = tuple(a + b / ranges for a, b in zip(option.uses, use(own.weights, key, 0), strict=True))
                grown.append(Option(own.weights, (*option.activations, key), option.damage + damages[place], uses))
        partial = _undominated(grown, range(len(LIMITS))) if prune else grown
    return partial


def _one_range(own: Option, key: str, entry: Mapping[str, Any], use: _Use) -> Option:
    """Return a weight with the only choice of its inputs, which no allocation needs to say."""
    change = zip(own.uses, use(own.weights, key, 0), use(own.weights, None, 0), strict=True)
    damage = own.damage + sum(entry["activations"][key])
    return Option(own.weights, (), damage, tuple(total + new - old for total, new, old in change))


_Use = Callable[[str | None, str | None, float], tuple[float, ...]]


def usage(name: str, entry: Mapping[str, Any], costs: Costs) -> _Use:
    """Return what a weight's key, an input's key (None: the base recipe's) and bytes come to of each limit."""
    base = costs.base.get(name, LayerChoice())
    widths = sorted(int(key) for key in entry["weights"] if "+" not in key)
    parameters, macs = entry["parameters"], entry["macs"]

    def use(weights: str | None, inputs: str | None, size: float) -> tuple[float, ...]:
        float_all = weights == KEEP
        bits_w = weight_bits(weights, widths)
        bits_a = FLOAT_BITS if float_all else _input_bits(inputs, base, costs.activation_bits)
        # An attention multiplies inputs by inputs; its probabilities have the bits of its inputs.
        bops = macs * bits_a * (bits_a if weights is None else bits_w)
        latency = _latency(name, weights, bits_a, costs) if costs.latency else 0.0
        told = {"weight_bits_mean": parameters * bits_w, "bytes": size, "memory_bytes": size}
        told |= {"bops": bops, "latency_ms": latency}
        return tuple(float(told[limit]) for limit in LIMITS)

    return use


def weight_bits(key: str | None, widths: Sequence[int]) -> float:
    """Return the mean bits of a key: of "4+0.5" half of the channels have the next of `widths`."""
    if key is None:
        return 0.0
    if key == KEEP:
        return float(FLOAT_BITS)
    bits, _, share = key.partition("+")
    above = [width for width in widths if width > int(bits)]
    return int(bits) + (float(share) * (above[0] - int(bits)) if share and above else 0.0)


def _input_bits(key: str | None, base: LayerChoice, default: int | None) -> float:
    """Return the mean bits of an input."""
    if key is not None:
        return float(key)
    stated = base.activation_bits if base.activation_bits is not None else default
    if stated is None or base.keep:
        return float(FLOAT_BITS)
    return sum(stated) / len(stated) if isinstance(stated, tuple) else float(stated)


def _latency(name: str, weights: str | None, bits_a: float, costs: Costs) -> float:
    """Return the measured milliseconds of a layer in a format; what the table of latencies does not have takes none."""
    measured = costs.latency.get(name)
    if measured is None:
        return 0.0
    if weights == KEEP:
        wanted = "float/float"
    else:
        bits = "float" if bits_a == FLOAT_BITS else f"{bits_a:g}"
        # Channels at the next width are unpacked like it.
        wanted = bits if weights is None else f"{weights.partition('+')[0]}/{bits}"
    if wanted not in measured:
        raise InvalidInputError(f"latency of layer {name}: got no {wanted}, wanted one of {', '.join(measured)}")
    return measured[wanted]


def _tied(layers: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options of layers that share a choice: the keys that all of them have."""
    if len(layers) == 1:
        return list(layers[0])
    # Attentions have no weights, and some layers no choice of inputs: they follow where they can.
    found = list(layers[0])
    for own in layers[1:]:
        found = [
            option.plus(other)
            for option in found
            for other in own
            if (option.weights is None or other.weights is None or option.weights == other.weights)
            and (not option.activations or not other.activations or option.activations == other.activations)
        ]
    return found


def _undominated(options: Sequence[Option], counted: Sequence[int]) -> list[Option]:
    """Return the options that no other beats, or equals, in damage and in each limit that counts; in a fixed order."""
    figures = np.array([[option.damage, *(option.uses[place] for place in counted)] for option in options])
    order = np.lexsort(figures.T[::-1])
    kept: list[int] = []
    for place in order:
        if not kept or not (figures[kept] <= figures[place]).all(axis=1).any():
            kept.append(int(place))
    return [options[place] for place in sorted(kept)]


def _choice(entry: Mapping[str, Any], option: Option) -> LayerChoice:
    """Return an option as a choice of one layer."""
    if option.weights == KEEP and len(entry["weights"]) > 1:
        return LayerChoice(keep=True)
    told: dict[str, Any] = {}
    if option.weights is not None and len(entry["weights"]) > 1:
        bits, _, share = option.weights.partition("+")
        told = {"weight_bits": int(bits), "promoted": float(share or 0)}
    if option.activations and len(entry["activations"]) > 1:
        bits_a = tuple(int(key) for key in option.activations)
        told["activation_bits"] = bits_a[0] if len(set(bits_a)) == 1 else bits_a
    return LayerChoice(**told)
