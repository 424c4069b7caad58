"""Proposals: for each budget the best allocation, a sweep of sizes, and candidates near them that may be better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quant_core.search.knapsack import OverBudgetError, cheapest, supported
from quant_core.search.price import Part, Price, price
from quant_core.search.space import BYTES, Costs, Space, Table, build_space
from quant_core.search.surrogate import Observation, Surrogate, fit
from quant_core.search.unmet import unmet_limits
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.enums import Objective
from quant_spec.numbers import significant
from quant_spec.search import SearchBudget
from quant_spec.tasks.propose import MeasuredPoint, Params

#: Sizes of the sweep.
SWEEP = 60
#: Power of a sample's range, as PSNR has it for pixels; only predictions before anything was measured depend on it.
_PEAK_POWER = 4.0
#: Draws for one more candidate, before nothing new is expected.
_MOST_DRAWS = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """An allocation with where it is from, and the budget that it is for."""

    allocation: Allocation
    origin: str
    budget: int | None
    price: Price


@dataclass(frozen=True, slots=True)
class Proposer:
    """Tables by variant, what they do not say, and what was learned."""

    params: Params
    tables: Mapping[str, Table]
    costs: Costs
    surrogate: Surrogate

    def spaces(self, weights: Any = None) -> dict[str, Space]:
        """Return the space of each variant, with damages as corrected by the surrogate."""
        limited = sorted({name for budget in self.params.budgets for name in budget.limits()})
        return {
            variant: build_space(
                corrected(table, self.surrogate, weights, variant),
                self.costs,
                per_unit=self.params.per_unit,
                limited=limited,
            )
            for variant, table in self.tables.items()
        }

    def candidate(self, allocation: Allocation, origin: str, budget: int | None = None) -> Candidate:
        """Price an allocation by its table as it is."""
        return Candidate(allocation, origin, budget, price(self.tables[allocation.variant], allocation, self.costs))

    def log_error(self, candidate: Candidate) -> float:
        """Return what the surrogate predicts."""
        return self.surrogate.log_error(candidate.allocation.variant, candidate.price)


def propose(tables: Mapping[str, Table], params: Params) -> dict[str, Any]:
    """Return proposals as `quant_spec.tasks.propose` describes them.

    Parameters
    ----------
    tables
        The merged table of each variant.
    """
    costs = Costs(
        params.keep,
        params.base,
        params.activation_bits,
        params.latency,
        params.latency_rest_ms,
        params.activation_bytes,
    )
    surrogate = fit(list(_observations(tables, params, costs)))
    proposer = Proposer(params, tables, costs, surrogate)
    spaces = proposer.spaces()
    infeasible = list(unmet_limits(params.budgets, spaces))
    sweep = [] if infeasible else _sweep(proposer, spaces)
    points = [] if infeasible else _points(proposer, spaces, sweep)
    return {
        "points": [_document(proposer, each) for each in points],
        "front": [
            [round(each.price.uses["bytes"]), significant(each.price.damage), _psnr(proposer.log_error(each), params)]
            for each in sweep
        ],
        "surrogate": {"n": surrogate.n, "residual_db": _decibels(surrogate.left_out_rms)},
        "infeasible": infeasible,
    }


def _observations(tables: Mapping[str, Table], params: Params, costs: Costs) -> Iterator[Observation]:
    """Return what can be learned from; points of other recipes' spaces teach nothing of this table."""
    for point in params.measured:
        value = _log_error(point, params.objective)
        if value is not None and point.allocation.variant in tables:
            allocation = point.allocation
            yield Observation(allocation.variant, price(tables[allocation.variant], allocation, costs), value)


def _log_error(point: MeasuredPoint, objective: Objective) -> float | None:
    """Return the natural logarithm of the measured error."""
    if objective is Objective.PSNR_DB:
        return None if point.psnr_db is None else -point.psnr_db * math.log(10) / 10 + math.log(_PEAK_POWER)
    value = point.fd if objective is Objective.FD else point.error
    return None if not value else math.log(value)


def corrected(table: Table, surrogate: Surrogate, weights: Any, variant: str) -> dict[str, Any]:
    """Return the table with all damages corrected."""
    offset = 0.0
    own = surrogate.weights if weights is None else weights
    if (place := surrogate.features.get(("variant", variant))) is not None:
        offset = float(own[place])

    def factor(layer: str, kind: str, key: str) -> float:
        return math.exp(offset) * surrogate.correction(Part(layer, kind, key, 0, 0.0), weights)

    layers = {}
    for name, entry in table["layers"].items():
        weighted = {
            key: {**cost, "damage": cost["damage"] * factor(name, "weights", key)}
            for key, cost in entry["weights"].items()
        }
        inputs = {
            key: [damage * factor(name, "activations", key) for damage in damages]
            for key, damages in entry["activations"].items()
        }
        layers[name] = {**entry, "weights": weighted, "activations": inputs}
    return {**table, "layers": layers}


def _best(
    proposer: Proposer, spaces: Mapping[str, Space], budget: SearchBudget, origin: str, place: int | None = None
) -> list[Candidate]:
    """Return the best allocation within a budget of each variant that has one, the best first."""
    found = []
    for variant, space in spaces.items():
        try:
            picked = cheapest(space.choices, space.limits(budget))
        except OverBudgetError:
            continue
        found.append(proposer.candidate(space.allocation(variant, picked.places.tolist()), origin, place))
    return sorted(found, key=proposer.log_error)


def _best_of_size(proposer: Proposer, spaces: Mapping[str, Space], size: float, origin: str) -> Candidate | None:
    """Return the best allocation of about a size over all variants, None if all are larger."""
    found = []
    for variant, space in spaces.items():
        try:
            picked = supported(space.choices, BYTES, size - space.base[BYTES])
        except OverBudgetError:
            continue
        found.append(proposer.candidate(space.allocation(variant, picked.places.tolist()), origin))
    return min(found, key=proposer.log_error, default=None)


def _sweep(proposer: Proposer, spaces: Mapping[str, Space]) -> list[Candidate]:
    """Return the best allocations at sizes from the smallest to the largest, without those that a smaller one beats."""
    reach = [space.reach()["bytes"] for space in spaces.values()]
    low, high = min(each[0] for each in reach), max(each[1] for each in reach)
    front: list[Candidate] = []
    for share in np.linspace(0, 1, SWEEP):
        best = _best_of_size(proposer, spaces, math.ceil(low * (high / low) ** float(share)), "front")
        if best is not None and (not front or proposer.log_error(best) < proposer.log_error(front[-1]) - 1e-9):
            front.append(best)
    return front


def _points(proposer: Proposer, spaces: Mapping[str, Space], sweep: Sequence[Candidate]) -> list[Candidate]:
    """Return what is to be measured: budgets first, then the front, then what may be better near both."""
    params = proposer.params
    known = {point.allocation.digest for point in params.measured}
    found: list[Candidate] = []

    def take(candidate: Candidate) -> bool:
        digest = candidate.allocation.digest
        if digest in known:
            return False
        known.add(digest)
        found.append(candidate)
        return True

    budgets = [_best(proposer, spaces, budget, "budget", place) for place, budget in enumerate(params.budgets)]
    first = not params.measured
    for rank in range(len(spaces) if first else 1):
        for best in budgets:
            if rank < len(best):
                take(best[rank])
    if params.uniform and first:
        for each in _uniform(proposer):
            take(each)
    free = max(params.candidates - len(found), 0)
    if first:
        for each in _spread(sweep, free):
            take(each)
    else:
        sizes = [each.price.uses["bytes"] for each in _spread(sweep, max(free, 1))]
        _refine(proposer, sizes, free, take)
    return found[: params.candidates]


def _refine(proposer: Proposer, sizes: Sequence[float], wanted: int, take: Callable[[Candidate], bool]) -> None:
    """Take the best allocations of tables drawn from the posterior: for the budgets, and between over the front."""
    generator = np.random.default_rng([proposer.params.seed, len(proposer.params.measured)])
    budgets = list(enumerate(proposer.params.budgets))
    taken = 0
    for number in range(_MOST_DRAWS * wanted):
        drawn = proposer.spaces(proposer.surrogate.draw(generator))
        # Every other one for a budget, of which each gets as many.
        if budgets and number % 2 == 0:
            place, budget = budgets[number // 2 % len(budgets)]
            best = next(iter(_best(proposer, drawn, budget, "refine", place)), None)
        else:
            best = _best_of_size(proposer, drawn, sizes[number % len(sizes)], "refine")
        taken += best is not None and take(best)
        if taken >= wanted:
            return


def _uniform(proposer: Proposer) -> Iterator[Candidate]:
    """Return all layers at one width, for each width that every layer with a choice has."""
    for variant, table in proposer.tables.items():
        chosen = {name: entry["weights"] for name, entry in table["layers"].items() if len(entry["weights"]) > 1}
        widths = set.intersection(*(set(entries) for entries in chosen.values())) if chosen else set()
        for width in sorted(int(key) for key in widths if "+" not in key):
            layers = {name: LayerChoice.model_validate({"weight_bits": width}) for name in chosen}
            for name, entry in table["layers"].items():
                if len(entry["activations"]) > 1:
                    bits = max(int(key) for key in entry["activations"])
                    base = proposer.costs.base.get(name, LayerChoice())
                    stated = base.activation_bits if base.activation_bits is not None else bits
                    layers[name] = layers.get(name, LayerChoice()).replaced(activation_bits=stated)
            suffix = "" if variant == "base" else f"-{variant}"
            yield proposer.candidate(Allocation(variant=variant, layers=layers), f"uniform-{width}{suffix}")


def _spread(sweep: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return some of a sweep, evenly spread."""
    if count <= 0 or not sweep:
        return []
    places = sorted({round(place) for place in np.linspace(0, len(sweep) - 1, count)})
    return [sweep[place] for place in places]


def _document(proposer: Proposer, each: Candidate) -> dict[str, Any]:
    """Return a candidate as JSON."""
    uses = each.price.uses
    return {
        "allocation": each.allocation.to_json(),
        "origin": each.origin,
        "budget": each.budget,
        "predicted": {
            "damage": significant(each.price.damage),
            "psnr_db": _psnr(proposer.log_error(each), proposer.params),
            "bytes": round(uses["bytes"]),
            "bits_mean": round(uses["weight_bits_mean"], 4),
            "bops": round(uses["bops"]),
            "latency_ms": significant(uses["latency_ms"]) if proposer.params.latency else None,
            "memory_bytes": round(uses["memory_bytes"]),
        },
    }


def _psnr(log_error: float, params: Params) -> float | None:
    """Return predicted PSNR; null where another figure was learned."""
    if params.objective is not Objective.PSNR_DB:
        return None
    return round(10 * (math.log(_PEAK_POWER) - log_error) / math.log(10), 3)


def _decibels(rms: float | None) -> float | None:
    return None if rms is None else round(10 * rms / math.log(10), 4)
