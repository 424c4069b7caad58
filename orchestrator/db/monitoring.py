"""What monitoring asks of the database: counts over what has not ended, cheap however much has."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Job, JobTask, KindTiming, Orchestrator, Task, in_states
from orchestrator.states import ACTIVE_JOBS, TaskState

#: An orchestrator that was not seen for so many seconds counts as gone.
ALIVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Depth:
    """How many tasks of a kind are in a state."""

    state: str
    kind: str
    tasks: int


@dataclass(frozen=True, slots=True)
class KindTotal:
    """Results of a kind that were ever recorded as computed on a type of device, and the seconds that they took."""

    kind: str
    device: str
    results: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Overview:
    """The service as the database knows it.

    `oldest_ready_seconds` is how long the task that has waited longest could have been claimed, 0 if none could; `jobs`
    counts those that have not ended by state, `orchestrators` those that were seen lately by state.
    """

    depths: tuple[Depth, ...]
    oldest_ready_seconds: float
    jobs: dict[str, int]
    orchestrators: dict[str, int]
    totals: tuple[KindTotal, ...]


def overview(session: Session) -> Overview:
    """Return the overview.

    Notes
    -----
    O(tasks of jobs that have not ended): queued and running tasks are counted from partial indexes, blocked ones from
    the jobs that want them, results from the sums that are kept of them.
    """
    depths = [*_ready(session, TaskState.QUEUED), *_ready(session, TaskState.RUNNING), *_blocked(session)]
    jobs = select(Job.state, func.count()).where(in_states(Job.state, ACTIVE_JOBS)).group_by(Job.state)
    alive = (
        select(Orchestrator.state, func.count())
        .where(Orchestrator.seen_at > epoch_seconds() - ALIVE_SECONDS)
        .group_by(Orchestrator.state)
    )
    sums = (func.sum(KindTiming.n), func.sum(KindTiming.seconds))
    totals = session.execute(select(KindTiming.kind, KindTiming.device, *sums).group_by("kind", "device"))
    return Overview(
        depths=tuple(depths),
        oldest_ready_seconds=_oldest_ready(session),
        jobs={state: int(n) for state, n in session.execute(jobs)},
        orchestrators={state: int(n) for state, n in session.execute(alive)},
        totals=tuple(KindTotal(kind, device, int(n), float(seconds)) for kind, device, n, seconds in totals),
    )


def _ready(session: Session, state: TaskState) -> list[Depth]:
    statement = select(Task.kind, func.count()).where(in_states(Task.state, [state])).group_by(Task.kind)
    return [Depth(state.value, kind, int(n)) for kind, n in session.execute(statement)]


def _blocked(session: Session) -> list[Depth]:
    active = select(Job.id).where(in_states(Job.state, ACTIVE_JOBS))
    wanted = select(JobTask.task_id).where(JobTask.job_id.in_(active))
    blocked = in_states(Task.state, [TaskState.BLOCKED])
    statement = select(Task.kind, func.count()).where(blocked, Task.id.in_(wanted)).group_by(Task.kind)
    return [Depth(TaskState.BLOCKED.value, kind, int(n)) for kind, n in session.execute(statement)]


def _oldest_ready(session: Session) -> float:
    ready_at = case((Task.queued_at > Task.not_before, Task.queued_at), else_=Task.not_before)
    statement = select(epoch_seconds() - func.min(ready_at)).where(
        in_states(Task.state, [TaskState.QUEUED]), Task.queued_at.is_not(None), Task.not_before <= epoch_seconds()
    )
    return max(0.0, session.scalar(statement) or 0.0)


def jobs_of(session: Session, tasks: list[str]) -> dict[str, list[str]]:
    """Return the jobs that have not ended and want these tasks: task to jobs, the oldest first."""
    found: dict[str, list[str]] = {}
    statement = (
        select(JobTask.task_id, JobTask.job_id)
        .join(Job, Job.id == JobTask.job_id)
        .where(JobTask.task_id.in_(tasks), in_states(Job.state, ACTIVE_JOBS))
        .order_by(Job.created_at, Job.id)
    )
    for task, job in session.execute(statement):
        found.setdefault(task, []).append(job)
    return found
