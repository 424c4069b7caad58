"""The weight bits of one recipe: an exact choice within a budget, from a table of sensitivities."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from quant_core.search.knapsack import cheapest
from quant_core.search.price import Price, price
from quant_core.search.space import Costs, Table, build_space
from quant_core.search.unmet import unmet_limits
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.errors import InvalidInputError
from quant_spec.record import Bits
from quant_spec.search import BASE_VARIANT, SearchBudget, unmet_text


@dataclass(frozen=True, slots=True)
class Chosen:
    """Bits of each layer, and what the table says of them and of the recipe's own."""

    bits: Mapping[str, Bits]
    price: Price
    own: Price


def choose_bits(table: Table, own: Mapping[str, Bits], fixed: Collection[str], budget: SearchBudget | None) -> Chosen:
    """Return the bits with the least damage within a budget.

    Parameters
    ----------
    table
        Of all groups, as `quant_spec.tasks.sensitivity` describes it.
    own
        Bits that the recipe gives each layer; layers of the table that are not named stay in full precision.
    fixed
        Layers that have these bits whatever the table says.
    budget
        None is as many bytes as the recipe's own bits take.

    Raises
    ------
    InvalidInputError
        If no choice meets the budget, or the table does not have a layer's own bits.
    """
    told = _told(table, own, fixed)
    before = price(told, _allocation(own), Costs())
    within = SearchBudget(bytes=round(before.uses["bytes"])) if budget is None else budget
    space = build_space(told, Costs(), limited=tuple(within.limits()))
    for each in unmet_limits([within], {BASE_VARIANT: space}):
        limit, got, smallest, largest = (each[name] for name in ("limit", "got", "smallest", "largest"))
        if largest is None or got < smallest:  # more than all choices take is no mistake: at most so much
            raise InvalidInputError(unmet_text(limit, got, smallest, largest, "passes.choose"))
    picked = cheapest(space.choices, space.limits(within))
    layers = space.allocation(BASE_VARIANT, picked.places.tolist()).layers
    chosen = {name: choice.weight_bits for name, choice in layers.items() if choice.weight_bits is not None}
    bits = dict(own) | chosen
    return Chosen(bits, price(told, _allocation(bits), Costs()), before)


def _allocation(bits: Mapping[str, Bits]) -> Allocation:
    return Allocation(layers={name: LayerChoice(weight_bits=width) for name, width in bits.items()})


def _told(table: Table, own: Mapping[str, Bits], fixed: Collection[str]) -> dict[str, Any]:
    """Return the table with what is chosen: widths of weights. What stays in full precision is bytes, and no choice."""
    layers: dict[str, Any] = {}
    size = table["base_bytes"]
    for name, entry in table["layers"].items():
        weights = {key: cost for key, cost in entry["weights"].items() if "+" not in key}
        if not weights:
            continue  # an attention
        if name not in own:
            size += entry["keep"]["bytes"]
            continue
        if str(own[name]) not in weights:
            raise InvalidInputError(
                f"layer {name}: got {own[name]} bits, wanted one of the table's {', '.join(weights)}"
            )
        if name in fixed:
            weights = {str(own[name]): weights[str(own[name])]}
        layers[name] = {**entry, "weights": weights, "activations": {}}
    return {**table, "layers": layers, "base_bytes": size}
