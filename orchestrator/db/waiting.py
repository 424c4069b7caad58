"""What jobs wait for, where they wait for more than their turn: an outage, or a GPU that no cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import exists, or_, select
from sqlalchemy.orm import Session

from orchestrator.db.models import Job, JobTask, Task, in_states
from orchestrator.db.orchestrators import clusters, waiting_reason
from orchestrator.db.rows import JobRow, SearchRow
from orchestrator.states import ACTIVE_JOBS, JobState, TaskState

_CUDA = "cuda"


def job_waiting(session: Session, job: JobRow) -> str | None:
    """Return what a job waits for, as "cluster: got …, wanted …"; None if it has ended, or waits for its turn alone."""
    if job.state not in ACTIVE_JOBS:
        return None
    return waiting_reason(session) or _gpu_reason(session, job.id, job.device, job.gpu_type)


def job_in_front(session: Session, job: JobRow) -> str | None:
    """Return the oldest of the jobs that run while this one, which is queued, has not begun; None if none does."""
    if job.state is not JobState.QUEUED:
        return None
    others = select(Job.id).where(Job.state == JobState.RUNNING.value, Job.id != job.id)
    return session.scalars(others.order_by(Job.created_at, Job.id).limit(1)).first()


def search_waiting(session: Session, search: SearchRow) -> str | None:
    """Return what a search waits for: all that works on this database does, or one of its jobs for a GPU."""
    if search.state not in ACTIVE_JOBS:
        return None
    if (reason := waiting_reason(session)) is not None:
        return reason
    jobs = select(Job.id, Job.device, Job.gpu_type).where(
        Job.search_id == search.id, Job.device == _CUDA, in_states(Job.state, ACTIVE_JOBS)
    )
    reasons = (_gpu_reason(session, *job) for job in session.execute(jobs.order_by(Job.created_at).limit(1)))
    return next(reasons, None)


def _gpu_reason(session: Session, job: str, device: str, gpu_type: str | None) -> str | None:
    """Say which GPU a job's tasks cannot do without, and that no cluster has one that may be used.

    Nothing is said while no orchestrator has looked at its cluster yet, which it does with the first task.
    """
    if device != _CUDA:
        return None
    nodes = [node for cluster in clusters(session).values() for node in cluster.get("nodes", ())]
    there = [node for node in nodes if node["gpus"] and not node["left_out"]]
    if not nodes or any(_is_type(node, gpu_type) for node in there) or not _has_gpu_task(session, job):
        return None
    found = sorted({f"{node['node']}: {node['gpus']} x {node['gpu_type'] or 'unknown'}" for node in there})
    wanted = "a GPU" if gpu_type is None else f"a GPU of type {gpu_type}"
    return f"cluster: got {', '.join(found) or 'no GPU that can be used'}, wanted {wanted}"


def _is_type(node: Mapping[str, Any], gpu_type: str | None) -> bool:
    return gpu_type is None or (node["gpu_type"] or "").casefold() == gpu_type.casefold()


def _has_gpu_task(session: Session, job: str) -> bool:
    """Say whether a task of a job is ready that has to run on a GPU; one that another job lets run anywhere has not."""
    mine = exists().where(JobTask.job_id == job, JobTask.task_id == Task.id)
    must = or_(Task.gpus > 0, Task.deterministic)
    ready = select(Task.id).where(mine, in_states(Task.state, [TaskState.QUEUED]), Task.gpu_memory_bytes > 0, must)
    return session.scalars(ready.limit(1)).first() is not None
