"""How jobs end: their target succeeded, a task failed that they need, or the user cancelled them.

A task is wanted by every active job that holds it. When a job ends, its unfinished tasks that no other job wants are
cancelled; a running one among them loses its lease, so its holder hears of it when it renews.
Tasks are changed before jobs: a claim, which alone does not hold `lock_graph`, locks them in that order too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, case, func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.event_log import record_event
from orchestrator.db.models import Job, JobTask, Result, Task, in_states
from orchestrator.db.releases import publish
from orchestrator.db.statements import batches, move_job, move_task
from orchestrator.states import ACTIVE_JOBS, UNFINISHED_TASKS, JobEvent, TaskEvent, TaskState

#: The kind of task whose result is published.
RELEASE_KIND = "release"


def succeed_jobs(session: Session, done: Sequence[str]) -> None:
    """End the active jobs whose target is among the tasks `done`; publish their releases."""
    for batch in batches(done):
        statement = (
            select(Job.id, Job.release_name, Task.kind, Result.outputs, Result.metrics)
            .join(Task, Task.id == Job.target_task)
            .join(Result, Result.key == Task.key)
            .where(in_states(Job.state, ACTIVE_JOBS), Job.target_task.in_(batch))
            .order_by(Job.id)
        )
        jobs = session.execute(statement).all()
        _drop_tasks(session, [job.id for job in jobs])
        for job in jobs:
            _succeed(session, job.id, job.release_name if job.kind == RELEASE_KIND else None, job.outputs, job.metrics)


def fail_jobs_that_need(session: Session, task: str, error: str) -> None:
    """Fail every active job that holds a task which will not succeed."""
    needing = select(JobTask.job_id).where(JobTask.task_id == task)
    jobs = list(session.scalars(select(Job.id).where(in_states(Job.state, ACTIVE_JOBS), Job.id.in_(needing))))
    end_jobs(session, sorted(jobs), JobEvent.FAIL, error)


def end_jobs(session: Session, jobs: Sequence[str], event: JobEvent, error: str | None) -> None:
    """Fail or cancel jobs and let go of their tasks."""
    _drop_tasks(session, jobs)
    for job in jobs:
        moved = session.scalars(move_job(event).where(Job.id == job).values(error=error).returning(Job.id)).all()
        if moved:
            record_event(session, event, job=job, data={"error": error} if error else {})


def _succeed(
    session: Session, job: str, release_name: str | None, outputs: Mapping[str, str], metrics: Mapping[str, Any]
) -> None:
    values: dict[str, Any] = {
        "digest": outputs.get("artifact"),
        "metrics": metrics.get("metrics"),
        "started_at": func.coalesce(Job.started_at, epoch_seconds()),
    }
    if release_name is not None:
        if "artifact" not in outputs or "artifact_bytes" not in metrics or "metrics" not in metrics:
            error = "release: got no artifact, artifact_bytes or metrics from its last task, wanted all three"
            end_jobs(session, [job], JobEvent.FAIL, error)
            return
        size = int(metrics["artifact_bytes"])
        release = publish(session, release_name, outputs["artifact"], size, job=job, metrics=metrics["metrics"])
        values["release"] = release
    if session.scalars(move_job(JobEvent.SUCCEED).where(Job.id == job).values(**values).returning(Job.id)).all():
        record_event(session, JobEvent.SUCCEED, job=job, data={"release": values.get("release")})


def _when_stopped() -> ColumnElement[float]:
    """Until when the holder of a cancelled task may go on: it learns of the cancelling when it renews its lease.

    Whoever revives the task before then leaves it to wait, so that it never runs twice at once; nor does it if it is
    cancelled and revived once more meanwhile. A wait after a fault is forgotten: that attempt has ended.
    """
    ended_badly = Task.error.is_not(None)
    return case(
        (in_states(Task.state, [TaskState.RUNNING]), Task.lease_until), (ended_badly, 0.0), else_=Task.not_before
    )


def _let_twins_wait(session: Session, until: Mapping[str, float]) -> None:
    """Let queued tasks of other ids that ask for the same results wait as the cancelled ones would."""
    for batch in batches(until):
        twins = (in_states(Task.state, [TaskState.QUEUED]), Task.key.in_(batch))
        later = case(until, value=Task.key)
        statement = update(Task).where(*twins, Task.not_before < later).values(not_before=later)
        session.execute(statement, execution_options={"synchronize_session": False})


def _drop_tasks(session: Session, jobs: Sequence[str]) -> None:
    """Cancel what only these jobs want, and let the rest have the priority of those that still want it."""
    if not jobs:
        return
    held = select(JobTask.task_id).where(JobTask.job_id.in_(jobs))
    unfinished: list[ColumnElement[bool]] = [in_states(Task.state, UNFINISHED_TASKS), Task.id.in_(held)]
    others = (
        select(func.max(Job.priority))
        .join(JobTask, JobTask.job_id == Job.id)
        .where(JobTask.task_id == Task.id, in_states(Job.state, ACTIVE_JOBS), Job.id.not_in(jobs))
        .scalar_subquery()
    )
    statement = move_task(TaskEvent.CANCEL).where(*unfinished, others.is_(None)).values(not_before=_when_stopped())
    cancelled = session.execute(statement.returning(Task.id, Task.attempt, Task.key, Task.not_before)).all()
    for row in cancelled:
        record_event(session, TaskEvent.CANCEL, task=row.id, attempt=row.attempt)
    _let_twins_wait(session, {row.key: row.not_before for row in cancelled if row.key and row.not_before > 0})
    session.execute(
        update(Task).where(*unfinished).values(priority=others).execution_options(synchronize_session=False)
    )
