"""How one task's success moves the graph on.

A task whose inputs all exist gets its key. If a result of that key is recorded the task has succeeded, and so on: a
chain of recorded tasks succeeds level by level, in the transaction that started it. All of it runs under `lock_graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from sqlalchemy import Table, bindparam, func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.job_ends import fail_jobs_that_need, succeed_jobs
from orchestrator.db.models import JobTask, Json, Result, Task, TaskInput, in_states
from orchestrator.db.session import record_event
from orchestrator.db.statements import batches, move_task
from orchestrator.states import TASK_TRANSITIONS, TaskEvent, TaskState
from quant_spec.keys import task_key


def complete(session: Session, done: Sequence[str], ready: Sequence[str] = ()) -> None:
    """Draw every consequence of the success of the tasks `done`, and of the tasks `ready` having all inputs."""
    finished = list(done)
    ready = [*ready, *_unblock(session, done)]
    while ready:
        cached: list[str] = []
        for batch in batches(ready):
            cached += _promote(session, batch)
        finished += cached
        ready = _unblock(session, cached)
    succeed_jobs(session, finished)


def mark_twins_cached(session: Session, key: str) -> list[str]:
    """Mark as cached the queued tasks of other ids that ask for a result that has just been recorded; return them."""
    statement = move_task(TaskEvent.CACHE).where(Task.key == key, in_states(Task.state, [TaskState.QUEUED]))
    twins = list(session.scalars(statement.values(error=None).returning(Task.id)))
    _mark_cached(session, twins)
    return twins


def recount(session: Session, job_id: str) -> list[str]:
    """Count anew what the blocked tasks of a job wait for; return those that wait for nothing."""
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    source = Task.__table__.alias("source")
    missing = (
        select(func.count())
        .select_from(TaskInput)
        .join(source, source.c.id == TaskInput.source_id)
        .where(TaskInput.task_id == Task.id, source.c.state != TaskState.SUCCEEDED.value)
        .scalar_subquery()
    )
    blocked = (in_states(Task.state, [TaskState.BLOCKED]), Task.id.in_(wanted))
    session.execute(update(Task).where(*blocked).values(waiting=missing), execution_options=_PLAIN)
    return list(session.scalars(select(Task.id).where(*blocked, Task.waiting == 0).order_by(Task.seq)))


_PLAIN = {"synchronize_session": False}


def _unblock(session: Session, done: Iterable[str]) -> list[str]:
    """Count down the tasks that read the outputs of `done`; return those that have all their inputs now."""
    ready: list[str] = []
    for batch in batches(done):
        readers = select(TaskInput.task_id).where(TaskInput.source_id.in_(batch))
        count = (
            select(func.count())
            .select_from(TaskInput)
            .where(TaskInput.task_id == Task.id, TaskInput.source_id.in_(batch))
            .scalar_subquery()
        )
        statement = (
            update(Task)
            .where(in_states(Task.state, [TaskState.BLOCKED]), Task.id.in_(readers))
            .values(waiting=Task.waiting - count)
            .returning(Task.seq, Task.id, Task.waiting)
        )
        rows = session.execute(statement, execution_options=_PLAIN).all()
        ready += [row.id for row in sorted(rows, key=lambda row: row.seq) if row.waiting == 0]
    return ready


def _promote(session: Session, ready: Sequence[str]) -> list[str]:
    """Give ready tasks their keys and queue them; return those whose results were recorded already."""
    columns = (Task.id, Task.kind, Task.version, Task.params, Task.inputs)
    rows = session.execute(
        select(*columns).where(Task.id.in_(ready), in_states(Task.state, [TaskState.BLOCKED])).order_by(Task.seq)
    ).all()
    outputs = _outputs(session, {item["task"] for row in rows for item in _references(row.inputs)})
    changes: list[dict[str, Any]] = []
    broken: list[tuple[str, str]] = []
    for row in rows:
        try:
            inputs = _resolve(row.inputs, outputs)
        except KeyError as error:
            broken.append((row.id, f"input of {row.kind}: got no output {error}, wanted one that its source gives"))
        else:
            key = task_key(row.kind, row.version, row.params, inputs)
            changes.append({"b_id": row.id, "b_key": key, "b_inputs": inputs})
    known = recorded_keys(session, [change["b_key"] for change in changes])
    _apply(session, TaskEvent.PROMOTE, [change for change in changes if change["b_key"] not in known])
    cached = [change for change in changes if change["b_key"] in known]
    _apply(session, TaskEvent.CACHE, cached)
    _mark_cached(session, [change["b_id"] for change in cached])
    # Last, because it cancels tasks that were to be queued just now.
    for task, reason in broken:
        _fail(session, task, reason)
    return [change["b_id"] for change in cached]


def recorded_keys(session: Session, keys: Iterable[str]) -> set[str]:
    """Return which of these keys have a recorded result."""
    known: set[str] = set()
    for batch in batches(keys):
        known.update(session.scalars(select(Result.key).where(Result.key.in_(batch))))
    return known


def _apply(session: Session, event: TaskEvent, changes: Sequence[dict[str, Any]]) -> None:
    """Move tasks to a state that needs a key, with their keys and resolved inputs."""
    if not changes:
        return
    # A statement on the table, not the class: the class would take a list of parameters for rows by primary key.
    table = cast(Table, Task.__table__)
    statement = (
        update(table)
        .where(table.c.id == bindparam("b_id"), in_states(table.c.state, TASK_TRANSITIONS[event].sources))
        .values(state=TASK_TRANSITIONS[event].target.value, key=bindparam("b_key"))
        .values(inputs=bindparam("b_inputs", type_=Json), queued_at=epoch_seconds())
    )
    session.connection().execute(statement, list(changes))
    if event is TaskEvent.PROMOTE:
        for change in changes:
            record_event(session, event, task=change["b_id"])


def _mark_cached(session: Session, tasks: Sequence[str]) -> None:
    """Note for every job that wants these tasks that they needed no computing."""
    for batch in batches(tasks):
        statement = update(JobTask).where(JobTask.task_id.in_(batch)).values(cached=True)
        session.execute(statement, execution_options=_PLAIN)
    for task in tasks:
        record_event(session, TaskEvent.CACHE, task=task)


def _fail(session: Session, task: str, error: str) -> None:
    session.execute(move_task(TaskEvent.FAIL).where(Task.id == task).values(error=error))
    record_event(session, TaskEvent.FAIL, task=task, data={"fault": "invalid", "error": error})
    fail_jobs_that_need(session, task, error)


def _references(inputs: dict[str, list[Any]]) -> list[dict[str, str]]:
    return [item for items in inputs.values() for item in items if isinstance(item, dict)]


def _resolve(inputs: dict[str, list[Any]], outputs: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Put digests in place of references."""
    return {
        name: [outputs[item["task"]][item["output"]] if isinstance(item, dict) else item for item in items]
        for name, items in inputs.items()
    }


def _outputs(session: Session, tasks: set[str]) -> dict[str, dict[str, str]]:
    """Return the outputs of tasks that have succeeded."""
    found: dict[str, dict[str, str]] = {}
    for batch in batches(sorted(tasks)):
        statement = select(Task.id, Result.outputs).join(Result, Result.key == Task.key).where(Task.id.in_(batch))
        found.update((row.id, row.outputs) for row in session.execute(statement))
    return found
