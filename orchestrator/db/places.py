"""Where the tasks of a job ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from orchestrator.db.models import JobTask, Result, Task, in_states
from orchestrator.states import TaskState


@dataclass(frozen=True, slots=True)
class TaskPlace:
    """A task and the node that it is on, or was last; `ran` is what its recorded result says."""

    task: str
    kind: str
    label: str
    state: str
    attempt: int
    cached: bool
    node: str | None
    seconds: float | None
    ran: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "task": self.task,
            "kind": self.kind,
            "label": self.label,
            "state": self.state,
            "attempt": self.attempt,
            "cached": self.cached,
            "node": self.ran.get("node") or self.node,
            "device": self.ran.get("device"),
            "seconds": self.seconds,
            "peak_rss_bytes": self.ran.get("peak_rss_bytes"),
            "peak_gpu_bytes": self.ran.get("peak_gpu_bytes"),
            "versions": self.ran.get("versions"),
        }


def task_places(session: Session, job_id: str) -> list[TaskPlace]:
    """Return where a job's tasks are or were that have been on a node, in the order in which they came."""
    succeeded = in_states(Task.state, [TaskState.SUCCEEDED])
    statement = (
        select(
            *(Task.id, Task.kind, Task.label, Task.state, Task.attempt, JobTask.cached, Task.ran_on),
            *(Result.seconds, Result.ran),
        )
        .join(JobTask, JobTask.task_id == Task.id)
        .outerjoin(Result, (Result.key == Task.key) & succeeded)
        .where(JobTask.job_id == job_id, or_(Task.ran_on.is_not(None), Result.key.is_not(None)))
        .order_by(Task.seq)
    )
    return [
        TaskPlace(
            row.id, row.kind, row.label, row.state, row.attempt, row.cached, row.ran_on, row.seconds, row.ran or {}
        )
        for row in session.execute(statement)
    ]
