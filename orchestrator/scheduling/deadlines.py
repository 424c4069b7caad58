"""How long a task may run before it counts as stuck: ten times its estimate and at least an hour, or what it was given.

Silence of its process shows much earlier (`workers.execution.pulse`); a deadline is for one that lives and gets
nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from orchestrator.db.queries import kind_timings
from orchestrator.db.rows import ClaimedTask, Timing
from orchestrator.db.session import Database
from orchestrator.planning.estimate import Rate, fitted_rates

#: A task may take so many times what is expected of it, but at least so many seconds.
FACTOR, LEAST_SECONDS = 10.0, 3600.0
#: How long a task may take whose kind never ran here, so that there is no expectation.
UNKNOWN_SECONDS = 86_400.0
_LEARN_SECONDS = 60.0


def known_rates(timings: Mapping[str, Timing]) -> dict[str, Rate]:
    """Return what to expect of tasks, by kind, of those kinds that have run; `timings` is what these took."""
    rates = fitted_rates(timings)
    return {kind: rates[kind] for kind in timings if kind in rates}


def deadline_seconds(task: ClaimedTask, rates: Mapping[str, Rate]) -> float:
    """Return how long a task may run.

    Parameters
    ----------
    task
        `deadline_seconds` of its own, from its recipe, wins.
    rates
        What is expected of kinds that have run.
    """
    if task.deadline_seconds is not None:
        return task.deadline_seconds
    if task.kind not in rates:
        return UNKNOWN_SECONDS
    return max(LEAST_SECONDS, FACTOR * rates[task.kind].seconds(task.work))


class Deadlines:
    """Deadlines by what this database has recorded, looked up now and then."""

    def __init__(self, database: Database) -> None:
        """Read from `database` when first asked."""
        self._database = database
        self._rates: Mapping[str, Rate] = {}
        self._read_at = float("-inf")

    def learn(self) -> None:
        """Read what tasks took, if that was last done a while ago; raises DatabaseError."""
        now = time.monotonic()
        if now - self._read_at > _LEARN_SECONDS:
            with self._database.session(read_only=True) as session:
                self._rates = known_rates(kind_timings(session))
            self._read_at = now

    def of(self, task: ClaimedTask) -> float:
        """Return how long a task may run, in seconds."""
        return deadline_seconds(task, self._rates)
