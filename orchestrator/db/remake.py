"""Doing an ended job again, whose results were lost: the same tasks, for the same release."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from sqlalchemy import func, insert, literal, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.enqueue import start_tasks
from orchestrator.db.lineage import makers
from orchestrator.db.models import Job, JobTask, in_states
from orchestrator.db.repair import settle, withdraw
from orchestrator.db.session import record_event
from orchestrator.states import ACTIVE_JOBS, JobState

#: What a job that is done again has of the one before.
_SAME = (
    *("priority", "model_name", "model_digest", "recipe_name", "recipe_digest", "recipe", "release_name"),
    *("target_task", "device", "gpu_type"),
)


def withdraw_lost(session: Session, target: str, blobs: Collection[str], lost: str) -> int:
    """Withdraw the results, of a task and of all that it depends on, that name one of some blobs; return how many.

    Call under `lock_graph`. `lost` is the blob that the log names.
    """
    keys = makers(session, [target], blobs)
    settle(session, withdraw(session, keys, lost))
    return len(keys)


def active_job(session: Session, target: str) -> str | None:
    """Return the oldest job that has not ended of those that have a task as their target."""
    active = (in_states(Job.state, ACTIVE_JOBS), Job.target_task == target)
    return session.scalar(select(Job.id).where(*active).order_by(Job.created_at).limit(1))


def remake_job(session: Session, job_id: str) -> str:
    """Queue a job's tasks again as a new job, or return the active one that has the same target.

    What it gives is published under the same name: the same bytes are the same version. Call under `lock_enqueue` and
    `lock_graph`.
    """
    old = session.get_one(Job, job_id)
    if old.target_task is not None and (same := active_job(session, old.target_task)) is not None:
        return same
    new = secrets.token_hex(6)
    values = {name: getattr(old, name) for name in _SAME}
    session.execute(insert(Job).values(**values, id=new, state=JobState.QUEUED.value, created_at=epoch_seconds()))
    wanted = select(literal(new), JobTask.task_id, literal(False)).where(JobTask.job_id == job_id)
    session.execute(insert(JobTask).from_select(["job_id", "task_id", "cached"], wanted))
    count = session.scalar(select(func.count()).where(JobTask.job_id == new))
    data = {"model": old.model_name, "recipe": old.recipe_name, "again": job_id, "tasks": count}
    record_event(session, "created", job=new, data=data)
    start_tasks(session, new)
    return new
