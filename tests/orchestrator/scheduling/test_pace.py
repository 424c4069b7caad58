"""More tasks are in flight where tasks are short."""

from __future__ import annotations

from orchestrator.scheduling.pace import AHEAD_SECONDS, LEAST_WEIGHT, Pace


def test_what_is_not_known_counts_in_full() -> None:
    assert Pace().weight("noop", 1) == 1.0


def test_short_tasks_count_little_by_and_by_and_never_nothing() -> None:
    pace, weights = Pace(), []
    for _ in range(40):
        pace.note("noop", 1, 0.0)
        weights.append(pace.weight("noop", 1))
    assert weights == sorted(weights, reverse=True)
    assert 0.5 < weights[0] < 1.0
    assert weights[-1] == LEAST_WEIGHT
    assert pace.weight("noop", 2) == pace.weight("other", 1) == 1.0


def test_one_long_task_is_believed_at_once() -> None:
    pace = Pace()
    for _ in range(40):
        pace.note("noop", 1, 0.0)
    pace.note("noop", 1, 10 * AHEAD_SECONDS)
    assert pace.weight("noop", 1) == 1.0
