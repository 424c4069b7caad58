"""What an allocation costs by the table: its damage in parts, and what it takes of each limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quant_core.search.space import KEEP, Costs, Table, usage
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.errors import InvalidInputError
from quant_spec.search import LIMITS
from quant_spec.sensitivity_table import weight_key


@dataclass(frozen=True, slots=True)
class Part:
    """The damage of one layer's weight ("weights") or of its inputs at one range of steps ("activations")."""

    layer: str
    kind: str
    key: str
    place: int
    damage: float


@dataclass(frozen=True, slots=True)
class Price:
    """Parts of the damage, and what is taken of each limit, by name; mean bits over all weights."""

    parts: tuple[Part, ...]
    uses: dict[str, float]

    @property
    def damage(self) -> float:
        """Return the whole damage."""
        return sum(part.damage for part in self.parts)


def price(table: Table, allocation: Allocation, costs: Costs) -> Price:
    """Add up what an allocation costs.

    Raises
    ------
    InvalidInputError
        If the table has no entry for a choice.
    """
    parts: list[Part] = []
    totals = dict.fromkeys(LIMITS, 0.0)
    weights = 0
    for name, entry in table["layers"].items():
        use = usage(name, entry, costs)
        choice, base = allocation.layers.get(name, LayerChoice()), costs.base.get(name, LayerChoice())
        weights += entry["parameters"]
        if choice.keep and entry["weights"]:
            own = use(KEEP, None, entry["keep"]["bytes"])
        else:
            key = _weight_key(name, entry["weights"], choice, base)
            size = 0 if key is None else entry["weights"][key]["bytes"]
            parts += [] if key is None else [Part(name, "weights", key, 0, entry["weights"][key]["damage"])]
            inputs = list(_inputs(name, entry["activations"], choice, base))
            parts += inputs
            fixed, free = use(key, None, size), use(key, None, 0)
            each = [use(key, part.key, 0) for part in inputs] or [free]
            means = [sum(values) / len(each) for values in zip(*each, strict=True)]
            own = tuple(total - old + new for total, old, new in zip(fixed, free, means, strict=True))
        totals = {limit: totals[limit] + value for limit, value in zip(LIMITS, own, strict=True)}
    totals["weight_bits_mean"] /= max(weights, 1)
    totals["bytes"] += table["base_bytes"]
    totals["memory_bytes"] += table["base_bytes"] + costs.activation_bytes
    totals["latency_ms"] += costs.latency_rest_ms
    return Price(tuple(parts), totals)


def _weight_key(name: str, entries: Table, choice: LayerChoice, base: LayerChoice) -> str | None:
    """Return the entry of a weight."""
    if len(entries) < 2:
        return next(iter(entries), None)
    stated = choice if choice.weight_bits is not None else base
    key = weight_key(stated)
    if stated.weight_bits is None or key not in entries:
        raise InvalidInputError(f"layer {name}: got weights of {key} bits, wanted one of {', '.join(entries)}")
    return key


def _inputs(name: str, entries: Table, choice: LayerChoice, base: LayerChoice) -> Iterator[Part]:
    """Return the parts of a layer's inputs, one for each range of steps."""
    if not entries:
        return
    ranges = len(next(iter(entries.values())))
    stated = choice.activation_bits if choice.activation_bits is not None else base.activation_bits
    if stated is None and len(entries) > 1:
        raise InvalidInputError(f"layer {name}: got inputs of no bits, wanted one of {', '.join(entries)}")
    if len(entries) == 1 or stated is None:
        keys = [next(iter(entries))] * ranges
    else:
        keys = [str(bits) for bits in stated] if isinstance(stated, tuple) else [str(stated)] * ranges
    for place, key in enumerate(keys):
        if key not in entries or len(keys) != ranges:
            raise InvalidInputError(f"layer {name}: got inputs of {key} bits, wanted one of {', '.join(entries)}")
        yield Part(name, "activations", key, place, entries[key][place])
