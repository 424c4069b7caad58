"""How the success of tasks moves the graph on.

A task whose inputs all exist gets its key. If a result of that key is recorded the task has succeeded, and so on: a
chain of recorded tasks succeeds level by level, in the transaction that started it.

All of it runs under `lock_graph` or, where tasks merely finish, under `share_graph`, beside others that do the same:

* Counting down takes the rows of the readers in order of `seq` and holds them, so two transactions that finish sources
  of one reader count one after the other, and the second, which promotes it, sees what the first recorded.
* Who records a result of a key, and who gives a key to a task, holds that key's advisory lock (`KEY_LOCK`) from before
  he looks at what the other may have done: either the task finds the result recorded, or the result finds the task
  queued (`_LOOK_AROUND`). Otherwise both could miss each other.
* What reaches further than the readers of the finished tasks (a result that is recorded already, another task of the
  same key, a job that ends) is left to one who is alone: `need_graph`.

Locks are taken in this order: the rows of finished tasks (running, by seq), their keys, the rows of readers (blocked,
by seq), their keys (sorted). A running task waits for nothing and a blocked one is not finished, so rows alone never
make a circle. Keys can, if a task and the twin of its own source are in hand at once; Postgres then ends one of the
transactions, which is run again (`Database.transact`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.event_log import record_event
from orchestrator.db.job_ends import fail_jobs_that_need, succeed_jobs
from orchestrator.db.models import JobTask, Task, TaskInput, in_states, sql_list
from orchestrator.db.session import is_alone, need_graph, note_ready
from orchestrator.db.sql import Statement, dump, read_json, rows_json, run, run_together, statement
from orchestrator.db.statements import batches, move_task, sources, target
from orchestrator.states import ACTIVE_JOBS, TaskEvent, TaskState
from quant_spec.keys import task_key

#: The number of a key's advisory lock, with the key's column in place of {}; negative, unlike those of other locks.
KEY_LOCK = "(hashtextextended({}, 0) | (CAST(1 AS bigint) << 63))"
# A transaction that gives more keys than this is alone: Postgres has room for some thousand locks in all.
_MOST_KEY_LOCKS = 200

_READY = "tasks.seq, tasks.id, tasks.kind, tasks.version"
_BLOCKED = f"tasks.state {sources(TaskEvent.PROMOTE)}"
# Large inputs are only read from tasks that are ready.
_IF_READY = "CASE WHEN tasks.waiting = 0 THEN tasks.{0} END AS {0}"
_COUNTED = f"{_READY}, tasks.waiting, {_IF_READY.format('params')}, {_IF_READY.format('inputs')}"
# Readers in the order that all keep, so that two transactions that finish sources of the same ones count one by one.
_READERS = f"""
    counts AS MATERIALIZED (
        SELECT edges.task_seq, count(*) AS n FROM %s JOIN task_inputs AS edges ON edges.source_seq = sources.seq
        GROUP BY edges.task_seq
    ), readers AS MATERIALIZED (
        SELECT tasks.seq, counts.n FROM counts JOIN tasks ON tasks.seq = counts.task_seq
        WHERE {_BLOCKED} ORDER BY tasks.seq FOR NO KEY UPDATE OF tasks
    )
"""
_COUNT = f"""
    UPDATE tasks SET waiting = tasks.waiting - readers.n FROM readers WHERE tasks.seq = readers.seq
    RETURNING {_COUNTED}
"""
_COUNT_DOWN = statement(
    f"""
    UPDATE tasks SET waiting = tasks.waiting - counts.n
    FROM (SELECT edges.task_seq, count(*) AS n FROM {{given}} JOIN tasks AS sources ON sources.id = given.id
        JOIN task_inputs AS edges ON edges.source_seq = sources.seq GROUP BY edges.task_seq)
         AS counts
    WHERE tasks.seq = counts.task_seq AND +{_BLOCKED}
    RETURNING {_COUNTED}
    """,
    {"id": "text"},
    postgres=f"WITH {_READERS % '{given} JOIN tasks AS sources ON sources.id = given.id'} {_COUNT}",
)
#: The same for a statement of Postgres' that makes tasks succeed, in which `done` are those and nothing else: `counted`
#: are their readers.
COUNT_DOWN_DONE = f"{_READERS % 'done AS sources'}, counted AS ({_COUNT})"
#: Of `counted`, those that have all their inputs now, as one value of JSON for `ready_readers`.
READY_COUNTED = "(SELECT json_agg(counted) FROM counted WHERE counted.waiting = 0)"
_SELECT_READY = statement(
    f"""
    SELECT {_READY}, tasks.params, tasks.inputs FROM {{given}} JOIN tasks ON tasks.id = given.id
    WHERE {_BLOCKED} ORDER BY tasks.seq
    """,
    {"id": "text"},
)
_OUTPUTS = statement(
    """
    SELECT tasks.id, results.outputs
    FROM {given} JOIN tasks ON tasks.id = given.id JOIN results ON results.key = tasks.key
    """,
    {"id": "text"},
)
# A key at a time: joined with what is queued, all of that may be read, if statistics saw nothing queued.
# What follows beside that: whether others wait for the same results, or jobs for these tasks; and the outputs of all
# that the tasks read which are ready now, each once, however many read it.
_AFTERMATH = f"""
    SELECT EXISTS (
        SELECT 1 FROM {{given}} JOIN tasks AS own ON own.id = given.id WHERE (
            SELECT 1 FROM tasks WHERE tasks.key = own.key AND tasks.state = '{TaskState.QUEUED.value}' LIMIT 1
        ) IS NOT NULL
    ) AS twins, EXISTS (
        SELECT 1 FROM {{given}} JOIN jobs ON jobs.target_task = given.id WHERE jobs.state IN ({sql_list(ACTIVE_JOBS)})
    ) AS jobs, (
        SELECT %s FROM (
            SELECT DISTINCT inputs.source_seq FROM {{given}}
            JOIN tasks AS own ON own.id = given.id
            JOIN task_inputs AS edges ON edges.source_seq = own.seq
            JOIN tasks AS readers ON readers.seq = edges.task_seq AND readers.waiting = 0
                 AND readers.state {sources(TaskEvent.PROMOTE)}
            JOIN task_inputs AS inputs ON inputs.task_seq = readers.seq
        ) AS wanted JOIN tasks ON tasks.seq = wanted.source_seq JOIN results ON results.key = tasks.key
    ) AS outputs
"""
_LOOK_AROUND = statement(
    _AFTERMATH % "json_group_object(tasks.id, json(results.outputs))",
    {"id": "text"},
    postgres=_AFTERMATH % "json_object_agg(tasks.id, results.outputs)",
)
# On SQLite, where whoever writes is alone, not used.
_LOCK_KEYS = statement(
    "SELECT 1",
    {"key": "text"},
    postgres=f"""
    SELECT pg_advisory_xact_lock({KEY_LOCK.format("key")})
    FROM (SELECT key FROM {{given}} ORDER BY key OFFSET 0) AS keys
    """,
)
_RECORDED = "EXISTS (SELECT 1 FROM results WHERE results.key = given.key)"
_GIVE_KEYS = f"""
    UPDATE tasks SET key = given.key, inputs = %s, queued_at = {{now}},
        state = CASE WHEN {_RECORDED} THEN {target(TaskEvent.CACHE)} ELSE {target(TaskEvent.PROMOTE)} END
    FROM {{given}} WHERE tasks.id = given.id AND %s
    RETURNING tasks.id, tasks.state
"""
_PROMOTE = statement(
    _GIVE_KEYS % ("given.inputs", f"+{_BLOCKED}"),
    {"id": "text", "key": "text", "inputs": "text"},
    postgres=_GIVE_KEYS % ("CAST(given.inputs AS json)", _BLOCKED),
)

# What reads no other task's output has its id for its key.
_QUEUE_NEW = statement(
    f"""
    UPDATE tasks SET key = id, queued_at = {{now}},
        state = CASE WHEN EXISTS (SELECT 1 FROM results WHERE results.key = tasks.id)
                THEN {target(TaskEvent.CACHE)} ELSE {target(TaskEvent.PROMOTE)} END
    WHERE id IN (SELECT id FROM {{given}}) AND +{_BLOCKED}
    RETURNING id, state
    """,
    {"id": "text"},
    postgres=f"""
    UPDATE tasks SET key = id, queued_at = {{now}},
        state = CASE WHEN EXISTS (SELECT 1 FROM results WHERE results.key = tasks.id)
                THEN {target(TaskEvent.CACHE)} ELSE {target(TaskEvent.PROMOTE)} END
    WHERE id IN (SELECT id FROM {{given}}) AND {_BLOCKED}
    RETURNING id, state
    """,
)


@dataclass(frozen=True, slots=True)
class Ready:
    """A task that has all its inputs."""

    seq: int
    id: str
    kind: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, list[Any]]


def count_down(session: Session, done: Sequence[str]) -> list[Ready]:
    """Count down the tasks that read the outputs of `done`, which have just succeeded; return those that have all."""
    ready: list[Ready] = []
    for batch in batches(done):
        rows = run(session, _COUNT_DOWN, given=_ids(batch))
        ready += [_ready(row) for row in rows if row.waiting == 0]
    return _in_order(ready)


def ready_readers(counted: Any) -> list[Ready]:
    """Return the tasks that `READY_COUNTED` names."""
    return _in_order(
        Ready(*(each[name] for name in ("seq", "id", "kind", "version", "params", "inputs"))) for each in counted or ()
    )


def look_around(tasks: Sequence[str]) -> tuple[Statement, Mapping[str, Any]]:
    """Return the statement that looks around after tasks have succeeded and their readers were counted down."""
    return _LOOK_AROUND, {"given": _ids(tasks)}


def draw_consequences(session: Session, keys: Mapping[str, str], ready: Sequence[Ready], around: Sequence[Any]) -> None:
    """Draw every consequence of the success of tasks whose results have just been recorded.

    Parameters
    ----------
    keys
        Of the tasks, by their ids.
    ready
        Their readers that have all inputs now.
    around
        The answer to `look_around`.
    """
    (found,) = around
    if found.twins or found.jobs:
        need_graph(session)
    twins = mark_twins_cached(session, list(keys.values())) if found.twins else []
    known = read_json(found.outputs) or {}
    ready = [*ready, *count_down(session, twins)]
    _complete(session, [*keys, *twins], ready, known, ends_jobs=bool(twins or found.jobs))


def start(session: Session, ready: Sequence[str], succeeded: Sequence[str] = ()) -> None:
    """Queue blocked tasks that wait for nothing, and end the jobs whose targets are among the tasks `succeeded`.

    Those succeeded before, so whoever reads them has been counted down.
    """
    rows = (row for batch in batches(ready) for row in run(session, _SELECT_READY, given=_ids(batch)))
    _complete(session, succeeded, [_ready(row) for row in rows], {}, ends_jobs=True)


def queue_new(session: Session, tasks: Sequence[str]) -> None:
    """Queue new tasks that read no other's output, or draw the consequences of their results being recorded already.

    Call it under `lock_graph`.
    """
    cached: list[str] = []
    for batch in batches(tasks):
        states = {row.id: row.state for row in run(session, _QUEUE_NEW, given=_ids(batch))}
        cached += _note_given(session, batch, states)
    _complete(session, cached, count_down(session, cached), {}, ends_jobs=True)


def _complete(
    session: Session,
    done: Sequence[str],
    ready: Sequence[Ready],
    known: Mapping[str, Mapping[str, str]],
    *,
    ends_jobs: bool,
) -> None:
    """Queue tasks that have all inputs, go on with those whose results are recorded, and end jobs.

    The readers of `done` have been counted down. `known` are outputs of some of the tasks that the ready ones read, by
    task.
    """
    finished, pending = list(done), ready
    while pending:
        cached: list[str] = []
        for batch in batches(pending):
            cached += _promote(session, batch, known)
        finished += cached
        pending = count_down(session, cached)
    if ends_jobs or len(finished) > len(done):
        succeed_jobs(session, finished)


def mark_twins_cached(session: Session, keys: Sequence[str]) -> list[str]:
    """Mark as cached the queued tasks of other ids that ask for results that have just been recorded; return them."""
    twins: list[str] = []
    for batch in batches(keys):
        statement = move_task(TaskEvent.CACHE).where(Task.key.in_(batch), in_states(Task.state, [TaskState.QUEUED]))
        twins += session.scalars(statement.values(error=None).returning(Task.id))
    _mark_cached(session, twins)
    return twins


def recount(session: Session, job_id: str) -> list[str]:
    """Count anew what the blocked tasks of a job wait for; return those that wait for nothing."""
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    source = Task.__table__.alias("source")
    missing = (
        select(func.count())
        .select_from(TaskInput)
        .join(source, source.c.seq == TaskInput.source_seq)
        .where(TaskInput.task_seq == Task.seq, source.c.state != TaskState.SUCCEEDED.value)
        .scalar_subquery()
    )
    blocked = (in_states(Task.state, [TaskState.BLOCKED]), Task.id.in_(wanted))
    # Rows that count right already, as those of new tasks do, are not written again.
    statement = update(Task).where(*blocked, Task.waiting != missing).values(waiting=missing)
    session.execute(statement, execution_options=_PLAIN)
    return list(session.scalars(select(Task.id).where(*blocked, Task.waiting == 0).order_by(Task.seq)))


_PLAIN = {"synchronize_session": False}


def _in_order(ready: Iterable[Ready]) -> list[Ready]:
    return sorted(ready, key=lambda each: each.seq)


def _ready(row: Any) -> Ready:
    return Ready(row.seq, row.id, row.kind, row.version, read_json(row.params), read_json(row.inputs))


def _promote(session: Session, ready: Sequence[Ready], known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Give ready tasks their keys and queue them; return those whose results were recorded already."""
    read = {item["task"] for task in ready for item in _references(task.inputs)}
    outputs = {**known, **_outputs(session, read - known.keys())}
    changes: list[dict[str, Any]] = []
    broken: list[tuple[str, str]] = []
    for task in ready:
        try:
            inputs = _resolve(task.inputs, outputs)
        except KeyError as error:
            broken.append((task.id, f"input of {task.kind}: got no output {error}, wanted one that its source gives"))
        else:
            key = task_key(task.kind, task.version, task.params, inputs)
            changes.append({"id": task.id, "key": key, "inputs": dump(inputs)})
    if broken or len(changes) > _MOST_KEY_LOCKS:
        need_graph(session)
    cached = _give_keys(session, changes)
    # Last, because it cancels tasks that were to be queued just now.
    for name, reason in broken:
        _fail(session, name, reason)
    return cached


def _give_keys(session: Session, changes: Sequence[dict[str, Any]]) -> list[str]:
    """Queue tasks under their keys; return those that have succeeded instead, as their results are recorded."""
    if not changes:
        return []
    given = rows_json(changes)
    locks = [] if is_alone(session) else [(_LOCK_KEYS, {"given": given})]
    *_, rows = run_together(session, *locks, (_PROMOTE, {"given": given}))
    states = {row.id: row.state for row in rows}
    return _note_given(session, [change["id"] for change in changes], states)


def _note_given(session: Session, tasks: Sequence[str], states: Mapping[str, str]) -> list[str]:
    """Note what has become of tasks that were given keys; return those that have succeeded by that."""
    cached = [task for task in tasks if states.get(task) == TaskState.SUCCEEDED.value]
    if cached:
        need_graph(session)
    for task in tasks:
        if states.get(task) == TaskState.QUEUED.value:
            record_event(session, TaskEvent.PROMOTE, task=task)
    note_ready(session, len(tasks) - len(cached))
    _mark_cached(session, cached)
    return cached


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


def _resolve(inputs: dict[str, list[Any]], outputs: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Put digests in place of references."""
    return {
        name: [outputs[item["task"]][item["output"]] if isinstance(item, dict) else item for item in items]
        for name, items in inputs.items()
    }


def _outputs(session: Session, tasks: set[str]) -> dict[str, dict[str, str]]:
    """Return the outputs of tasks that have succeeded."""
    found: dict[str, dict[str, str]] = {}
    for batch in batches(sorted(tasks)):
        found.update((row.id, read_json(row.outputs)) for row in run(session, _OUTPUTS, given=_ids(batch)))
    return found


def _ids(tasks: Iterable[str]) -> str:
    return rows_json([{"id": task} for task in tasks])
