"""Choose what stays in full precision, by what quantizing it does to the final samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from quant_core.fit.trials import Damages
from quant_core.search.knapsack import Choices, cheapest


class Kept(IntEnum):
    """What of a layer or an attention stays in full precision."""

    NOTHING = 0
    OPERANDS = 1  # a layer's input, or what an attention multiplies
    ALL = 2  # a layer's input and weight


@dataclass(frozen=True, slots=True)
class Part:
    """One layer, or one attention.

    `macs`: multiplications of a forward at batch 1. `added_bytes`: how much more the layer takes in the file with its
    weight in full precision; None for an attention.
    """

    name: str
    macs: int
    added_bytes: int | None


@dataclass(frozen=True, slots=True)
class Limits:
    """How many multiplications may have operands in full precision, and how many bytes may be added."""

    macs: float
    bytes: float


def choose_exceptions(parts: list[Part], damages: Damages, limits: Limits) -> dict[str, Kept]:
    """Return what is kept of which parts: the least sum of damages within both limits, by an exact knapsack.

    Parts of which nothing is kept are not in it.
    """
    item: list[int] = []
    cost: list[float] = []
    uses: list[tuple[float, float]] = []
    meant: list[Kept] = []
    for place, part in enumerate(parts):
        for kept, damage, added in _options(part, damages):
            item.append(place)
            cost.append(damage)
            uses.append((0 if kept is Kept.NOTHING else part.macs, added))
            meant.append(kept)
    if not parts:
        return {}
    scale = max(max(cost), 1e-300)
    choices = Choices(np.array(item), np.array(cost) / scale, np.array(uses, dtype=np.float64).T.copy())
    found = cheapest(choices, [limits.macs, limits.bytes])
    chosen = {part.name: meant[place] for part, place in zip(parts, found.places, strict=True)}
    return {name: kept for name, kept in chosen.items() if kept is not Kept.NOTHING}


def left_damage(parts: list[Part], damages: Damages, chosen: Mapping[str, Kept]) -> float:
    """Return the sum of the damages that these exceptions leave."""
    total = 0.0
    for part in parts:
        kept = chosen.get(part.name, Kept.NOTHING)
        total += next(damage for option, damage, _ in _options(part, damages) if option is kept)
    return total


def _options(part: Part, damages: Damages) -> list[tuple[Kept, float, float]]:
    """Return what can be kept of a part, with the damage that is left and the bytes that it adds."""
    if part.added_bytes is None:
        return [(Kept.NOTHING, damages.products[part.name], 0.0), (Kept.OPERANDS, 0.0, 0.0)]
    weight = damages.weights.get(part.name, 0.0)
    options = [(Kept.NOTHING, damages.inputs.get(part.name, 0.0) + weight, 0.0)]
    if part.name in damages.inputs:
        options.append((Kept.OPERANDS, weight, 0.0))
    if part.name in damages.weights:
        options.append((Kept.ALL, 0.0, float(max(0, part.added_bytes))))
    return options
