"""Pieces that several queries share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeVar, cast

from sqlalchemy import JSON, ColumnElement, Table, Update, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Base, Job, Task, in_states, sql_list
from orchestrator.db.rows import Lease
from orchestrator.db.sql import Statement, copy_rows, is_postgres, rows_json, send, statement
from orchestrator.states import (
    ACTIVE_JOBS,
    JOB_TRANSITIONS,
    TASK_TRANSITIONS,
    UNFINISHED_TASKS,
    JobEvent,
    JobState,
    TaskEvent,
    TaskState,
    Transition,
)

T = TypeVar("T")

#: Rows a statement names at most; well below the limits on parameters of both databases.
BATCH = 1000


def batches(items: Iterable[T], most: int = BATCH) -> Iterator[list[T]]:
    """Cut a stream into lists of `most` items at most, holding one at a time."""
    iterator = iter(items)
    while batch := list(islice(iterator, most)):
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


def insert_into(session: Session, table: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """Start an insert that may say what to do on conflict."""
    return postgresql.insert(table) if is_postgres(session) else sqlite.insert(table)


def sources(event: TaskEvent | JobEvent) -> str:
    """Return the SQL that says, behind `state`, that an event applies; literals, as partial indexes want them."""
    states = sorted(_transition(event).sources)
    return f"= '{states[0].value}'" if len(states) == 1 else f"IN ({sql_list(states)})"


def target(event: TaskEvent | JobEvent) -> str:
    """Return the SQL literal of the state that an event leads to."""
    return f"'{_transition(event).target.value}'"


def _transition(event: TaskEvent | JobEvent) -> Transition[TaskState] | Transition[JobState]:
    return TASK_TRANSITIONS[event] if isinstance(event, TaskEvent) else JOB_TRANSITIONS[event]


def insert_rows(
    session: Session,
    table: type[Base],
    columns: tuple[str, ...],
    rows: Iterable[Sequence[Any]],
    *,
    same: Mapping[str, Any],
    maybe: bool = False,
) -> None:
    """Insert rows, numbered in this order; JSON is given as text.

    Parameters
    ----------
    same
        Further columns, whose values are the same in all rows.
    maybe
        Rows that are there are left.
    """
    listed = (*columns, *same)
    if is_postgres(session) and not maybe:
        copy_rows(session, f"{table.__tablename__} ({', '.join(listed)})", rows, tuple(same.values()))
        return
    insertion = _insertion(table, listed, maybe)
    for batch in batches(rows):
        given = [{"n": number, **dict(zip(columns, row, strict=True)), **same} for number, row in enumerate(batch)]
        send(session, insertion, given=rows_json(given))


@cache
def _insertion(table: type[Base], names: tuple[str, ...], maybe: bool) -> Statement:
    columns = cast(Table, table.__table__).c
    json_columns = [name for name in names if isinstance(columns[name].type, JSON)]
    types = {
        name: "text" if name in json_columns else columns[name].type.compile(dialect=postgresql.dialect())
        for name in names
    }
    listed, tail = ", ".join(names), " ON CONFLICT DO NOTHING" if maybe else ""
    values = ", ".join(f"CAST({name} AS json)" if name in json_columns else name for name in names)
    into = f"INSERT INTO {table.__tablename__} ({listed}) SELECT "
    # WHERE true: SQLite would else take ON CONFLICT for a join's condition.
    end = f" FROM {{given}} WHERE true ORDER BY n{tail}"
    return statement(into + listed + end, {"n": "integer"} | types, postgres=into + values + end)
