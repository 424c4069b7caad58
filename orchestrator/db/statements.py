"""Pieces that several queries share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Update, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Base, Job, Task, in_states
from orchestrator.db.rows import Lease
from orchestrator.states import (
    ACTIVE_JOBS,
    JOB_TRANSITIONS,
    TASK_TRANSITIONS,
    UNFINISHED_TASKS,
    JobEvent,
    TaskEvent,
)

T = TypeVar("T")

#: Rows a statement names at most; well below the limits on parameters of both databases.
BATCH = 1000


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Cut a stream into lists, holding one at a time."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def move_task(event: TaskEvent) -> Update:
    """Start the statement that applies an event to tasks, where it applies."""
    transition = TASK_TRANSITIONS[event]
    values: dict[str, Any] = {"state": transition.target.value}
    if transition.target.value != "running":
        values |= {"lease_token": None, "lease_owner": None, "lease_until": None}
    if transition.target.value == "queued":
        values["queued_at"] = epoch_seconds()
    if transition.target not in UNFINISHED_TASKS:
        values["finished_at"] = epoch_seconds()
    return (
        update(Task)
        .where(in_states(Task.state, transition.sources))
        .values(**values)
        .execution_options(synchronize_session=False)
    )


def move_job(event: JobEvent) -> Update:
    """Start the statement that applies an event to jobs, where it applies."""
    transition = JOB_TRANSITIONS[event]
    values: dict[str, Any] = {"state": transition.target.value}
    if transition.target not in ACTIVE_JOBS:
        values["finished_at"] = epoch_seconds()
    return (
        update(Job)
        .where(in_states(Job.state, transition.sources))
        .values(**values)
        .execution_options(synchronize_session=False)
    )


def held(lease: Lease) -> Sequence[ColumnElement[bool]]:
    """Say that a lease is still good: this attempt, this token, and not run out."""
    return (
        Task.id == lease.task_id,
        Task.attempt == lease.attempt,
        Task.lease_token == lease.token,
        Task.lease_until > epoch_seconds(),
    )


def insert_or_ignore(session: Session, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, except those that are there."""
    if rows:
        session.execute(insert_into(session, table).on_conflict_do_nothing(), list(rows))


def insert_into(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """Start an insert that may say what to do on conflict."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
