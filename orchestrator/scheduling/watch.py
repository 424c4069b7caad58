"""What a scheduler tells of itself as it works, for metrics, health checks and logs to read from other threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

from orchestrator.db.rows import ClaimedTask
from orchestrator.graph import Resources
from workers.execution.executor import Capacity, Finished


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    """How a scheduler is at one moment.

    `passed_at` is when its loop last went round, by `time.monotonic`; `waiting_for` says what it can't reach, empty if
    it works. `capacity` is what the cluster has, None before there was anything to run; `claimed` what the `in_flight`
    tasks of this orchestrator occupy of it.
    """

    passed_at: float
    waiting_for: str = ""
    capacity: Capacity | None = None
    claimed: Resources = field(default_factory=lambda: Resources(0.0, 0.0, 0))
    in_flight: int = 0

    @property
    def silent_seconds(self) -> float:
        """How long ago the loop last went round."""
        return time.monotonic() - self.passed_at


class Watch:
    """Is told what a scheduler does. This one keeps its status and forgets the rest; metrics count it."""

    def __init__(self) -> None:
        """Start with a scheduler that is about to begin."""
        self._lock = threading.Lock()
        self._status = SchedulerStatus(time.monotonic())

    @property
    def status(self) -> SchedulerStatus:
        """The scheduler's status now."""
        with self._lock:
            return self._status

    def passed(self, waiting_for: str = "") -> None:
        """The loop went round, or what it can't reach was tried again and does not answer."""
        with self._lock:
            self._status = replace(self._status, passed_at=time.monotonic(), waiting_for=waiting_for)

    def occupied(self, capacity: Capacity, claimed: Resources, in_flight: int) -> None:
        """The cluster has `capacity`, of which so many tasks in flight occupy `claimed`."""
        with self._lock:
            self._status = replace(self._status, capacity=capacity, claimed=claimed, in_flight=in_flight)

    def ended(self, task: ClaimedTask, finished: Finished) -> None:
        """An attempt ended, well or not."""

    def lost(self, task: ClaimedTask) -> None:
        """The lease of a task in flight was lost."""

    def reaped(self, tasks: int) -> None:
        """So many tasks were taken back whose leases had run out, whoever held them."""
