"""What a search's report asks of the database: what each of its jobs took."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db.models import Job, JobTask, Result, Task
from orchestrator.db.rows import SearchJobCost
from orchestrator.states import TaskState


def search_job_costs(session: Session, search_id: str) -> list[SearchJobCost]:
    """Return what each job of a search took, in the order in which they were made.

    A task that several jobs want is spent by the first of them. What a job uses without computing it is saved.
    """
    statement = (
        select(Job.id, Job.model_name, JobTask.task_id, JobTask.cached, Task.state, Result.seconds)
        .join(JobTask, JobTask.job_id == Job.id)
        .join(Task, Task.id == JobTask.task_id)
        .outerjoin(Result, Result.key == Task.key)
        .where(Job.search_id == search_id)
        .order_by(Job.created_at, Job.id)
    )
    found: dict[str, SearchJobCost] = {}
    computed: set[str] = set()
    for row in session.execute(statement):
        cost = found.setdefault(row.id, SearchJobCost(row.id, row.model_name, 0, 0, 0.0, 0.0))
        seconds = row.seconds if row.seconds is not None and row.state == TaskState.SUCCEEDED.value else 0.0
        own = not row.cached and row.task_id not in computed
        if own:
            computed.add(row.task_id)
        found[row.id] = SearchJobCost(
            job=row.id,
            model=row.model_name,
            tasks=cost.tasks + 1,
            cached=cost.cached + (not own),
            seconds=cost.seconds + (seconds if own else 0.0),
            saved_seconds=cost.saved_seconds + (0.0 if own else seconds),
        )
    return list(found.values())
