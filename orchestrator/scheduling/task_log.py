"""Lines about tasks in the log, each with its task, attempt, kind and the job that wants it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from orchestrator.db.monitoring import jobs_of
from orchestrator.db.rows import ClaimedTask
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError
from workers.execution.executor import Finished

log = logging.getLogger(__name__)


class TaskLog:
    """Writes lines about tasks, and looks their jobs up where somebody reads that: in one statement for many tasks.

    The job of a line is the oldest that wants the task and has not ended; where several want it, `jobs` has them all.
    """

    def __init__(self, database: Database) -> None:
        """Look jobs up in `database`."""
        self._database = database
        self._jobs: dict[str, list[str]] = {}

    def started(self, tasks: Sequence[ClaimedTask]) -> None:
        """Tasks were handed to the executor."""
        if tasks and log.isEnabledFor(logging.INFO):
            self._look_up(tasks)
            for task in tasks:
                log.info("task started", extra=self._about(task))

    def ended(self, task: ClaimedTask, finished: Finished) -> None:
        """An attempt ended, well or not."""
        if finished.output is None:
            self.warn(f"task failed: {finished.error}", task, fault=str(finished.fault))
        elif log.isEnabledFor(logging.INFO):
            log.info("task finished", extra=self._about(task) | {"seconds": finished.output.metrics.get("seconds")})
        self._jobs.pop(task.lease.task_id, None)

    def warn(self, message: str, task: ClaimedTask, **fields: Any) -> None:
        """Something is wrong with a task."""
        if task.lease.task_id not in self._jobs:
            self._look_up([task])
        log.warning("%s", message, extra=self._about(task) | fields)
        self._jobs.pop(task.lease.task_id, None)

    def _look_up(self, tasks: Sequence[ClaimedTask]) -> None:
        """Find the jobs of tasks; a database that does not answer just now costs the lines their jobs, nothing else."""
        with suppress(DatabaseError), self._database.session(read_only=True) as session:
            self._jobs |= jobs_of(session, [task.lease.task_id for task in tasks])

    def _about(self, task: ClaimedTask) -> dict[str, Any]:
        """Return the fields of a line about a task."""
        jobs = self._jobs.get(task.lease.task_id, [])
        fields: dict[str, Any] = {"task": task.lease.task_id, "attempt": task.lease.attempt, "kind": task.kind}
        return {"job": jobs[0]} | fields | ({"jobs": jobs} if len(jobs) > 1 else {}) if jobs else fields
