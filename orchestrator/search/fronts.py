"""What was measured, compared: who dominates whom, which points are measured in full, which are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant_spec.enums import Objective
from quant_spec.numbers import human_bytes
from quant_spec.search import SearchBudget

#: Metrics of a score that limits are about, by the limit's name; latency and memory are only predicted.
_MEASURED = {"bytes": "bytes", "weight_bits_mean": "weight_bits_mean", "bops": "bops"}


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured point: its size in bytes and how bad it is (lower is better)."""

    number: int
    bytes: int
    loss: float
    metrics: Mapping[str, Any]
    predicted: Mapping[str, Any]


def loss_of(objective: Objective, metrics: Mapping[str, Any]) -> float | None:
    """Return how bad a measured model is by an objective, lower is better; None if that was not measured."""
    if objective is Objective.PREDICTION_ERROR:
        return prediction_error(metrics)
    value = metrics.get(objective.value)
    if not isinstance(value, int | float):
        return None
    return -float(value) if objective is Objective.PSNR_DB else float(value)


def prediction_error(metrics: Mapping[str, Any]) -> float | None:
    """Return the power of the predictions' error relative to the predictions', mean over the trajectory's steps."""
    steps = [step for step in metrics.get("sqnr_db_per_step") or () if isinstance(step, int | float)]
    return sum(10 ** (-step / 10) for step in steps) / len(steps) if steps else None


def measured_of(
    number: int, objective: Objective, metrics: Mapping[str, Any] | None, predicted: Mapping[str, Any] | None
) -> Measured | None:
    """Return a point's measurement; None if there is none."""
    if metrics is None or (loss := loss_of(objective, metrics)) is None:
        return None
    return Measured(number, int(metrics["bytes"]), loss, metrics, predicted or {})


def dominators(points: Sequence[Measured]) -> dict[int, int]:
    """Return, for each point that another dominates, the best of those: no larger, no worse, and one of both less.

    Of points that are equal in both the first stays.
    """
    found: dict[int, int] = {}
    best: Measured | None = None
    for point in sorted(points, key=lambda each: (each.bytes, each.loss, each.number)):
        if best is not None and best.loss <= point.loss:
            found[point.number] = best.number
        else:
            best = point
    return found


def front(points: Sequence[Measured]) -> list[Measured]:
    """Return the points that none dominates, by size."""
    beaten = dominators(points)
    return sorted((each for each in points if each.number not in beaten), key=lambda each: each.bytes)


def within(budget: SearchBudget, point: Measured) -> bool:
    """Say whether a point meets a budget: as measured, where that is measured, else as predicted."""
    for name, limit in budget.limits().items():
        got = point.metrics.get(_MEASURED[name]) if name in _MEASURED else point.predicted.get(name)
        if got is not None and got > limit * (1 + 1e-9):
            return False
    return True


def best_within(budget: SearchBudget, points: Sequence[Measured]) -> Measured | None:
    """Return the best point that meets a budget, the smaller of equals; None if none does."""
    good = [each for each in points if within(budget, each)]
    return min(good, key=lambda each: (each.loss, each.bytes, each.number), default=None)


def choose(points: Sequence[Measured], budgets: Sequence[SearchBudget], count: int) -> list[int]:
    """Choose points that go on: the best within each budget, then the front's, spread by size, then what is behind it.

    Returns
    -------
    list of int
        At most `count` numbers, the most wanted first.
    """
    chosen = [best.number for budget in budgets if (best := best_within(budget, points)) is not None]
    chosen = list(dict.fromkeys(chosen))[:count]
    left = [each for each in points if each.number not in chosen]
    while left and len(chosen) < count:
        layer = front(left)
        chosen += [each.number for each in spread(layer, count - len(chosen))]
        left = [each for each in left if each.number not in {taken.number for taken in layer}]
    return chosen


def spread(points: Sequence[Measured], count: int) -> list[Measured]:
    """Return at most so many of points that are sorted by size, evenly among them, both ends included."""
    if len(points) <= count:
        return list(points)
    if count == 1:
        return [points[len(points) // 2]]
    stride = (len(points) - 1) / (count - 1)
    return [points[round(place * stride)] for place in range(count)]


def why_dominated(point: Measured, by: Measured, objective: Objective, origin: str) -> str:
    """Return why a point was dropped, in one line."""
    return (
        f"dominated by point {by.number} ({origin}): {human_bytes(by.bytes)}, {loss_text(by.loss, objective)} against "
        f"{human_bytes(point.bytes)}, {loss_text(point.loss, objective)}"
    )


def loss_text(loss: float, objective: Objective) -> str:
    """Return how good a point is, for people."""
    if objective is Objective.PSNR_DB:
        return f"{-loss:.2f} dB"
    return f"error {loss:.3g}" if objective is Objective.PREDICTION_ERROR else f"Fréchet distance {loss:.3g}"
