"""Jobs: making, ending, retrying and looking at them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, Select, func, insert, literal, or_, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.enqueue import start_tasks
from orchestrator.db.event_log import last_settled_event, record_event
from orchestrator.db.job_ends import end_jobs
from orchestrator.db.models import Event, Job, JobTask, Result, Search, Task, in_states
from orchestrator.db.orchestrators import ended_here
from orchestrator.db.rows import EventRow, JobRow, KindRow, ModelRow, TaskRow
from orchestrator.db.session import lock_enqueue, lock_graph, notify_others
from orchestrator.db.statements import move_job
from orchestrator.db.stopped import held_by, note_stopped
from orchestrator.errors import NotFoundError
from orchestrator.graph import Resources
from orchestrator.states import ACTIVE_JOBS, JOB_TRANSITIONS, JobEvent, JobState, TaskEvent, TaskState
from quant_spec.errors import InvalidInputError
from workers.storage.names import check_name

#: Counts that `job_counts` returns.
COUNTS = ("total", "cached", "succeeded", "failed", "running", "queued")

_HEX = re.compile(r"[0-9a-f]{1,12}")
# A priority is a 32-bit integer column; half of its range is plenty and leaves no room for overflow.
_PRIORITY_BOUND = 2**30


def create_job(
    session: Session,
    *,
    model: ModelRow,
    recipe_name: str,
    recipe: Mapping[str, Any],
    recipe_digest: str,
    release_name: str | None = None,
    priority: int = 0,
    device: str = "auto",
    gpu_type: str | None = None,
    owner: str = "",
    search: str | None = None,
) -> str:
    """Make a job without tasks; return its id, 12 random hexadecimal digits.

    `owner` is who wants it, `search` the search that it belongs to, if one.

    Raises
    ------
    InvalidInputError
        If the release's name is not one, or the priority is beyond ±2^30.
    """
    if release_name is not None:
        check_name(release_name)
    if abs(priority) > _PRIORITY_BOUND:
        raise InvalidInputError(f"priority: got {priority}, wanted -2^30 to 2^30")
    # From here on `nothing_left` waits for this transaction; enqueueing takes the same lock.
    lock_enqueue(session)
    job_id = secrets.token_hex(6)
    values = {"id": job_id, "state": JobState.QUEUED.value, "priority": priority, "release_name": release_name}
    values |= {"model_name": model.name, "model_digest": model.digest, "created_at": epoch_seconds()}
    values |= {"recipe_name": recipe_name, "recipe_digest": recipe_digest, "recipe": dict(recipe)}
    values |= {"device": device, "gpu_type": gpu_type, "owner": owner, "search_id": search}
    session.execute(insert(Job).values(**values))
    data = {"model": model.name, "recipe": recipe_name, "priority": priority}
    record_event(session, "created", job=job_id, data=data)
    return job_id


def cancel_job(session: Session, job_id: str) -> bool:
    """Cancel a job and the tasks that no other job wants; False if it had ended already.

    A running task of those loses its lease at once: its holder stops when it next renews. Nobody waits for a holder
    that is known to have ended.
    """
    lock_graph(session)
    state = find_job(session, job_id).state
    if state not in ACTIVE_JOBS:
        return False
    held = held_by(session, job_id, ended_here(session))
    end_jobs(session, [job_id], JobEvent.CANCEL, None)
    note_stopped(session, held)
    return True


def retry_job(session: Session, job_id: str) -> None:
    """Start a failed or cancelled job again: what succeeded stays, what failed or was cancelled runs anew.

    Raises
    ------
    InvalidInputError
        If the job neither failed nor was cancelled.
    """
    lock_graph(session)
    statement = move_job(JobEvent.RETRY).where(Job.id == job_id)
    statement = statement.values(error=None, started_at=None, finished_at=None)
    if session.scalars(statement.returning(Job.id)).one_or_none() is None:
        state = find_job(session, job_id).state
        wanted = " or ".join(sorted(JOB_TRANSITIONS[JobEvent.RETRY].sources))
        raise InvalidInputError(f"job {job_id}: got state {state}, wanted {wanted}")
    record_event(session, JobEvent.RETRY, job=job_id)
    start_tasks(session, job_id)
    notify_others(session)


def find_job(session: Session, prefix: str) -> JobRow:
    """Return the job whose id begins with these digits.

    Raises
    ------
    NotFoundError
        If there is none.
    InvalidInputError
        If there are several.
    """
    rows: Sequence[Job] = []
    if _HEX.fullmatch(prefix):
        rows = session.scalars(select(Job).where(Job.id.startswith(prefix)).order_by(Job.id).limit(2)).all()
    if not rows:
        raise NotFoundError(f"job: got {prefix!r}, wanted one of jobs ls")
    if len(rows) > 1:
        raise InvalidInputError(f"job: got {prefix!r}, which fits several ({rows[0].id}, ...); wanted more digits")
    return _job_row(rows[0])


def find_active_job(
    session: Session,
    model_digest: str,
    recipe_digest: str,
    release_name: str,
    *,
    device: str,
    gpu_type: str | None,
    deterministic: bool,
) -> JobRow | None:
    """Return the newest job that has not ended and does exactly this; None if there is none.

    What it was asked to run on is in its recipe: a deterministic one may have been bound to a type of device since.
    """
    statement = (
        select(Job)
        .where(in_states(Job.state, ACTIVE_JOBS), Job.model_digest == model_digest, Job.recipe_digest == recipe_digest)
        .where(Job.release_name == release_name)
        .order_by(Job.created_at.desc())
    )
    for job in session.scalars(statement):
        asked = job.recipe.get("resources") or {}
        places = (asked.get("device", "auto"), asked.get("gpu_type"), bool(job.recipe.get("deterministic")))
        if places == (device, gpu_type, deterministic):
            return _job_row(job)
    return None


def list_jobs(session: Session, *, states: Iterable[JobState] = (), limit: int = 100) -> list[JobRow]:
    """Return jobs, newest first; all, or those in some states."""
    statement = select(Job).order_by(Job.created_at.desc(), Job.id).limit(limit)
    if wanted := list(states):
        statement = statement.where(in_states(Job.state, wanted))
    return [_job_row(job) for job in session.scalars(statement)]


def work_left(session: Session) -> bool:
    """Return whether any job or search has not ended."""
    jobs = select(literal(1)).where(in_states(Job.state, ACTIVE_JOBS))
    searches = select(literal(1)).where(in_states(Search.state, ACTIVE_JOBS))
    return bool(session.scalar(select(or_(jobs.exists(), searches.exists()))))


def nothing_left(session: Session) -> bool:
    """Return whether no job is left, having waited for those that are being submitted or retried at this moment.

    Without waiting, a job whose transaction has begun and not ended would not be seen.
    """
    lock_enqueue(session)
    lock_graph(session)
    return not work_left(session)


def job_counts(session: Session, job_id: str) -> dict[str, int]:
    """Return how many tasks a job has in all and in each state; `succeeded` has the cached, `queued` the blocked."""
    kinds = job_kinds(session, job_id)
    return {name: sum(getattr(kind, name) for kind in kinds) for name in COUNTS}


def job_kinds(session: Session, job_id: str) -> list[KindRow]:
    """Return a job's tasks summed by kind, in the order in which the kinds first appear."""
    computed = in_states(Task.state, [TaskState.SUCCEEDED]) & ~JobTask.cached
    ended = in_states(Task.state, [TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED])
    states = {
        state.value: func.count().filter(in_states(Task.state, [state])).label(state.value) for state in TaskState
    }
    statement = (
        select(
            Task.kind,
            func.count().label("total"),
            func.count().filter(JobTask.cached).label("cached"),
            *states.values(),
            func.coalesce(func.sum(Result.seconds).filter(computed), 0.0).label("seconds"),
            func.coalesce(func.sum(Task.work).filter(computed), 0.0).label("work"),
            func.coalesce(func.sum(Task.work).filter(~ended), 0.0).label("work_left"),
        )
        .join(JobTask, JobTask.task_id == Task.id)
        .outerjoin(Result, Result.key == Task.key)
        .where(JobTask.job_id == job_id)
        .group_by(Task.kind)
        .order_by(func.min(Task.seq))
    )
    return [
        KindRow(
            kind=row.kind,
            total=row.total,
            cached=row.cached,
            succeeded=row.succeeded,
            failed=row.failed,
            cancelled=row.cancelled,
            running=row.running,
            queued=row.queued + row.blocked,
            seconds=row.seconds,
            work=row.work,
            work_left=row.work_left,
        )
        for row in session.execute(statement)
    ]


def list_tasks(session: Session, job_id: str, *, kind: str | None = None) -> list[TaskRow]:
    """Return a job's tasks in the order in which they came, all or those of one kind."""
    statement = _tasks_of(job_id).order_by(Task.seq)
    if kind is not None:
        statement = statement.where(Task.kind == kind)
    return [_task_row(row) for row in session.execute(statement)]


def find_task(session: Session, job_id: str, task_id: str) -> TaskRow:
    """Return one task of a job; else NotFoundError."""
    row = session.execute(_tasks_of(job_id).where(Task.id == task_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"task: got {task_id!r}, wanted one of job {job_id}")
    return _task_row(row)


def events(session: Session, job_id: str, after_id: int = 0, limit: int = 1000) -> list[EventRow]:
    """Return what happened to a job and its tasks since it was created, oldest first.

    Parameters
    ----------
    after_id
        Only events with a greater id; with the last one seen, this follows the log and misses nothing.
    """
    last = last_settled_event(session)
    first = select(func.min(Event.id)).where(Event.job_id == job_id).scalar_subquery()
    tasks = select(JobTask.task_id).where(JobTask.job_id == job_id)
    statement = (
        select(Event)
        .where(Event.id > after_id, Event.id >= first, *([] if last is None else [Event.id <= last]))
        .where(or_(Event.job_id == job_id, Event.job_id.is_(None) & Event.task_id.in_(tasks)))
        .order_by(Event.id)
        .limit(limit)
    )
    return [
        EventRow(each.id, each.job_id, each.task_id, each.attempt, each.at, each.event, each.data)
        for each in session.scalars(statement)
    ]


def is_invalid(session: Session, job: JobRow) -> bool:
    """Whether a failed job met bad input, which no retry mends, as it ran; its error is then that of the task."""
    tasks = select(JobTask.task_id).where(JobTask.job_id == job.id)
    statement = select(Event.data).where(Event.task_id.in_(tasks), Event.event == TaskEvent.FAIL.value)
    return any(data["fault"] == "invalid" and data["error"] == job.error for data in session.scalars(statement))


def _tasks_of(job_id: str) -> Select[Any]:
    return (
        select(Task, JobTask.cached, Result.seconds, Result.outputs, Result.metrics, Result.ran)
        .join(JobTask, JobTask.task_id == Task.id)
        .outerjoin(Result, (Result.key == Task.key) & in_states(Task.state, [TaskState.SUCCEEDED]))
        .where(JobTask.job_id == job_id)
    )


def _task_row(row: Row[Any]) -> TaskRow:
    task: Task = row[0]
    return TaskRow(
        id=task.id,
        key=task.key,
        kind=task.kind,
        version=task.version,
        label=task.label,
        state=TaskState(task.state),
        attempt=task.attempt,
        faults_task=task.faults_task,
        faults_infrastructure=task.faults_infrastructure,
        priority=task.priority,
        resources=Resources(task.cpus, task.gpus, task.memory_bytes, task.gpu_memory_bytes),
        work=task.work,
        seconds=row.seconds,
        error=task.error,
        outputs=row.outputs,
        metrics=row.metrics,
        not_before=task.not_before,
        started_at=task.started_at,
        finished_at=task.finished_at,
        cached=row.cached,
        ran_on=task.ran_on,
        ran=row.ran,
    )


def _job_row(job: Job) -> JobRow:
    return JobRow(
        id=job.id,
        state=JobState(job.state),
        priority=job.priority,
        model_name=job.model_name,
        model_digest=job.model_digest,
        recipe_name=job.recipe_name,
        recipe_digest=job.recipe_digest,
        recipe=job.recipe,
        release_name=job.release_name,
        target_task=job.target_task,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        error=job.error,
        release=job.release,
        digest=job.digest,
        metrics=job.metrics,
        device=job.device,
        gpu_type=job.gpu_type,
        search=job.search_id,
        owner=job.owner,
    )
