"""The queue: leases on tasks, and what becomes of the tasks.

Contract, the same on SQLite and Postgres, for any number of orchestrators:

* a task is held by at most one lease, and a key by at most one task at a time;
* a lease is (task, attempt, token); attempts only grow. Whatever is done with a lease that ran out or was taken away
  returns False and changes nothing;
* a result, its task's success, the tasks it unblocks and the jobs it ends become visible together or not at all;
* faults of a task's own and of the infrastructure under it are counted apart; a lease given back counts as neither.

Every function is about many tasks at once, in a few statements (`sql.py`). Claims skip rows that another transaction
holds. Finishing, renewing and giving back share the graph with each other, and take rows in order of `seq`; a finish
that ends a job, and faults, have the graph for themselves (`session.py`, `promote.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Row, case, select
from sqlalchemy.orm import Session

from orchestrator.db.candidates import KEY_IS_FREE, read_candidates, wishes_of
from orchestrator.db.clock import epoch_seconds
from orchestrator.db.event_log import record_event
from orchestrator.db.job_ends import fail_jobs_that_need
from orchestrator.db.models import Task, in_states
from orchestrator.db.picking import Picker, after_out_of_memory, pick
from orchestrator.db.promote import (
    COUNT_DOWN_DONE,
    KEY_LOCK,
    READY_COUNTED,
    Ready,
    count_down,
    draw_consequences,
    look_around,
    ready_readers,
)
from orchestrator.db.repair import repair_lost, send_back
from orchestrator.db.rows import ClaimedTask, Lease, TaskEnd
from orchestrator.db.session import (
    GraphNeededError,
    is_alone,
    lock_graph,
    need_graph,
    notify_others,
    share_graph,
    trying_shared,
)
from orchestrator.db.sql import Statement, dump, is_postgres, read_json, rows_json, run, run_together, send, statement
from orchestrator.db.statements import batches, held, move_task, sources, target
from orchestrator.errors import ResultError
from orchestrator.graph import Resources
from orchestrator.states import JobEvent, TaskEvent, TaskState
from quant_spec.keys import canonical_json
from workers.execution.cluster import CUDA_CONTEXT_BYTES

T = TypeVar("T")
#: Seconds to wait after the 1st, 2nd, ... fault of a task's own before it runs again; one more fault is final.
TASK_BACKOFF = (2.0, 4.0)
#: The same for faults of the infrastructure: a lost worker, node, lease or store.
INFRASTRUCTURE_BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0)

#: Fault to its counter and backoff. "invalid" is bad input, which no retry mends; it counts as the task's own.
FAULTS: Mapping[str, tuple[Any, tuple[float, ...]]] = {
    "task": (Task.faults_task, TASK_BACKOFF),
    "infrastructure": (Task.faults_infrastructure, INFRASTRUCTURE_BACKOFF),
    "memory": (Task.faults_infrastructure, INFRASTRUCTURE_BACKOFF),
    "refused": (Task.faults_infrastructure, INFRASTRUCTURE_BACKOFF),
    "invalid": (Task.faults_task, ()),
}

_ERROR_CHARACTERS = 10_000
_RUNNING = in_states(Task.state, [TaskState.RUNNING])

_LEASE = {"id": "text", "attempt": "integer", "token": "text"}
_NO_LEASE = "lease_token = NULL, lease_owner = NULL, lease_until = NULL"
_MINE = f"""
    tasks.id = given.id AND tasks.attempt = given.attempt AND tasks.lease_token = given.token
    AND tasks.state {sources(TaskEvent.FINISH)}
"""
_GOOD = f"{_MINE} AND tasks.lease_until > {{now}}"
# Postgres: the rows of good leases, locked in an order that all keep.
_HELD = """
    held AS MATERIALIZED (
        SELECT tasks.seq FROM given JOIN tasks ON %s ORDER BY tasks.seq FOR NO KEY UPDATE OF tasks
    )
"""
_GIVEN = "given AS MATERIALIZED (SELECT * FROM {given})"


def _on_good_leases(values: str, returning: str, good: str = _GOOD) -> Statement:
    """Make the statement that changes the tasks of leases that are good."""
    return statement(
        f"UPDATE tasks SET {values} FROM {{given}} WHERE {good} RETURNING {returning}",
        _LEASE,
        postgres=f"""
        WITH {_GIVEN}, {_HELD % good}
        UPDATE tasks SET {values} FROM held WHERE tasks.seq = held.seq RETURNING {returning}
        """,
    )


_CLAIMED = ", ".join(
    f"tasks.{name}"
    for name in (
        "id",
        "attempt",
        "kind",
        "version",
        "params",
        "inputs",
        "cpus",
        "gpus",
        "memory_bytes",
        "gpu_memory_bytes",
        "work",
        "label",
        "device",
        "gpu_type",
        "alone",
        "batch_divisor",
        "deterministic",
        "deadline_seconds",
    )
)
_TAKE_LEASE = f"""
    state = {target(TaskEvent.CLAIM)}, attempt = tasks.attempt + 1, lease_token = :token, lease_owner = :owner,
    started_at = {{now}}, lease_until = {{now}} + CAST(:seconds AS double precision), ran_on = %s.ran_on
"""
_WAITING_JOBS = f"""
    SELECT jobs.id FROM jobs WHERE jobs.state {sources(JobEvent.START)}
    AND jobs.id IN (SELECT job_tasks.job_id FROM %s JOIN job_tasks ON job_tasks.task_id = %s.id)
"""
_START = f"UPDATE jobs SET state = {target(JobEvent.START)}, started_at = {{now}}"
# On SQLite two statements.
_CLAIM = statement(
    f"""
    UPDATE tasks SET {_TAKE_LEASE % "given"} FROM {{given}}
    WHERE tasks.id = given.id AND +tasks.state {sources(TaskEvent.CLAIM)} AND {KEY_IS_FREE}
    RETURNING {_CLAIMED}
    """,
    {"id": "text", "ran_on": "text"},
    # The state as a text that no index is of: all that is queued may else be read, if statistics saw nothing queued.
    postgres=f"""
    WITH chosen AS MATERIALIZED (
        SELECT tasks.seq, given.ran_on, pg_try_advisory_xact_lock({KEY_LOCK.format("tasks.key")}) AS is_mine
        FROM {{given}} JOIN tasks ON tasks.id = given.id WHERE tasks.state || '' {sources(TaskEvent.CLAIM)}
    ), taken AS (
        UPDATE tasks SET {_TAKE_LEASE % "chosen"} FROM chosen
        WHERE tasks.seq = chosen.seq AND chosen.is_mine AND {KEY_IS_FREE}
        RETURNING {_CLAIMED}
    ), waiting AS MATERIALIZED (
        -- One that another transaction holds is begun, or ended, by that: no claim waits.
        {_WAITING_JOBS % ("taken", "taken")} ORDER BY jobs.id FOR NO KEY UPDATE OF jobs SKIP LOCKED
    ), started AS (
        {_START} FROM waiting WHERE jobs.id = waiting.id RETURNING jobs.id
    )
    SELECT taken.*, (SELECT json_agg(started.id) FROM started) AS started FROM taken
    """,
)
_START_JOBS = statement(f"{_START} WHERE id IN ({_WAITING_JOBS % ('{given}', 'given')}) RETURNING id", {"id": "text"})
_RENEWED = ("lease_until = {now} + CAST(:seconds AS double precision)", "tasks.id, tasks.attempt, tasks.lease_token")
_RENEW = _on_good_leases(*_RENEWED)
# Also those that ran out, as long as nobody has taken the tasks.
_RENEW_LATE = _on_good_leases(*_RENEWED, _MINE)
_RELEASE = _on_good_leases(
    f"state = {target(TaskEvent.RELEASE)}, queued_at = {{now}}, {_NO_LEASE}", "tasks.id, tasks.attempt"
)
_SUCCEED = f"state = {target(TaskEvent.FINISH)}, error = NULL, finished_at = {{now}}, {_NO_LEASE}"
_ESTIMATES = {"memory_bytes": "bigint", "gpu_memory_bytes": "bigint", "batch_divisor": "integer"}
_FINISHED = ", ".join(f"tasks.{name}" for name in ("id", "key", "kind", "version", "work", "attempt", *_ESTIMATES))
_END = {
    "outputs": "text",
    "metrics": "text",
    "ran": "text",
    "seconds": "double precision",
    "device": "text",
    "peak_rss_bytes": "bigint",
    "peak_gpu_bytes": "bigint",
}
_RESULT = "key, kind, outputs, metrics, ran, seconds, created_at"
_PEAKS = {
    "peak_rss_bytes": "peak_rss_bytes",
    "peak_gpu_bytes": "peak_gpu_bytes",
    "memory_ratio": """
        CASE WHEN peak_rss_bytes > 0 AND memory_bytes > 0
        THEN CAST(peak_rss_bytes AS double precision) / memory_bytes ELSE 0 END
    """,
    # With a part of the batch it needed less than the next task of its kind will.
    "gpu_memory_ratio": f"""
        CASE WHEN peak_gpu_bytes > 0 AND gpu_memory_bytes > 0
        THEN CAST(peak_gpu_bytes * batch_divisor + {CUDA_CONTEXT_BYTES} AS double precision) / gpu_memory_bytes
        ELSE 0 END
    """,
}
_TIMING = f"kind, version, device, shard, n, seconds, work, {', '.join(_PEAKS)}"
_SUMS = f"count(*), sum(seconds), sum(work), {', '.join(f'max({peak})' for peak in _PEAKS.values())}"
_ADD_UP = "ON CONFLICT (kind, version, device, shard) DO UPDATE SET " + ", ".join(
    [f"{name} = kind_timings.{name} + excluded.{name}" for name in ("n", "seconds", "work")]
    + [f"{name} = {{max}}(kind_timings.{name}, excluded.{name})" for name in _PEAKS]
)
#: Rows of one kind's timings that Postgres' connections are spread over.
TIMING_SHARDS = 64
# On SQLite four statements, where Postgres has one. That counts down the readers of what it has finished, not of all
# that it was given: a task whose lease is good no more may have been counted before.
_FINISH = statement(
    f"UPDATE tasks SET {_SUCCEED} FROM {{given}} WHERE {_GOOD} RETURNING {_FINISHED}",
    _LEASE | _END,
    postgres=f"""
    WITH {_GIVEN}, {_HELD % _GOOD}, done AS (
        UPDATE tasks SET {_SUCCEED} FROM held WHERE tasks.seq = held.seq RETURNING tasks.seq, {_FINISHED}
    ), ends AS (
        SELECT done.*, given.outputs, given.metrics, given.ran, given.seconds, given.device,
               given.peak_rss_bytes, given.peak_gpu_bytes
        FROM done JOIN given ON given.id = done.id AND given.attempt = done.attempt
    ), recorded AS (
        INSERT INTO results ({_RESULT})
        SELECT key, kind, CAST(outputs AS json), CAST(metrics AS json), CAST(ran AS json), seconds, {{now}} FROM ends
        ON CONFLICT DO NOTHING
    ), timed AS (
        INSERT INTO kind_timings ({_TIMING})
        SELECT kind, version, device, pg_backend_pid() % {TIMING_SHARDS}, {_SUMS}
        FROM ends GROUP BY kind, version, device ORDER BY kind, version, device
        {_ADD_UP.format(max="greatest")}
    ), {COUNT_DOWN_DONE}
    SELECT id, attempt, key, pg_advisory_xact_lock({KEY_LOCK.format("key")}),
           CASE WHEN row_number() OVER () = 1 THEN {READY_COUNTED} END AS ready
    FROM done
    """,
)
_RECORD = statement(
    f"""
    INSERT INTO results ({_RESULT})
    SELECT key, kind, outputs, metrics, ran, seconds, {{now}} FROM {{given}} WHERE true ON CONFLICT DO NOTHING
    """,
    {"key": "text", "kind": "text"} | _END,
)
_TIME = statement(
    f"""
    INSERT INTO kind_timings ({_TIMING})
    SELECT kind, version, device, 0, {_SUMS} FROM {{given}} WHERE true GROUP BY kind, version, device
    {_ADD_UP.format(max="max")}
    """,
    {"kind": "text", "version": "integer", "work": "double precision"} | _ESTIMATES | _END,
)


def claim_tasks(
    session: Session,
    *,
    owner: str,
    limit: int,
    lease_seconds: float,
    picker: Picker | None = None,
) -> list[ClaimedTask]:
    """Take leases on the next tasks: highest priority first, then those that came first.

    Parameters
    ----------
    owner
        Who claims, for people to read.
    limit
        How many at most.
    lease_seconds
        How long the leases last unless renewed.
    picker
        Decides which tasks start now, and on which node; without one, the first do, on any.

    Notes
    -----
    O(g · limit · log n) for g different needs (CPUs, memory, ...) among the queued tasks, however many there are: it
    reads the head of each group. A task whose key is running under another id is left queued; it succeeds when
    that one does. One whose key another transaction is just finishing or claiming is left for the next claim.
    """
    if picker is None:
        where: Mapping[str, str] = {}
        chosen = [each.id for each in read_candidates(session, limit)][:limit]
    else:
        where = pick(session, picker, limit)
        chosen = list(where)
    if not chosen:
        return []
    token = secrets.token_hex(16)
    given = rows_json([{"id": task, "ran_on": where.get(task)} for task in chosen])
    rows = run(session, _CLAIM, given=given, token=token, owner=owner, seconds=lease_seconds)
    order = {task: position for position, task in enumerate(chosen)}
    rows = sorted(rows, key=lambda row: order[row.id])
    for row in rows:
        record_event(session, TaskEvent.CLAIM, task=row.id, attempt=row.attempt, data={"owner": owner})
    for job in _started_jobs(session, rows):
        record_event(session, JobEvent.START, job=job)
    return [_claimed_task(row, token) for row in rows]


def _started_jobs(session: Session, rows: Sequence[Row[Any]]) -> list[str]:
    """Return the jobs that begin with these tasks."""
    if not rows:
        return []
    if is_postgres(session):
        return rows[0].started or []
    return [row.id for row in run(session, _START_JOBS, given=rows_json([{"id": row.id} for row in rows]))]


def _claimed_task(row: Row[Any], token: str) -> ClaimedTask:
    return ClaimedTask(
        lease=Lease(row.id, row.attempt, token),
        kind=row.kind,
        version=row.version,
        params=read_json(row.params),
        inputs=read_json(row.inputs),
        resources=Resources(row.cpus, row.gpus, row.memory_bytes, row.gpu_memory_bytes),
        work=row.work,
        label=row.label,
        wishes=wishes_of(row),
        deadline_seconds=row.deadline_seconds,
    )


def renew_leases(session: Session, leases: Sequence[Lease], lease_seconds: float, *, late: bool = False) -> list[Lease]:
    """Let leases last `lease_seconds` from now; return those that are still good, in the order given.

    The others ran out, or no job wants their tasks any more: their holders should stop. With `late`, one that ran out
    and that nobody has taken back yet is good again: the database itself may have been out.
    """
    share_graph(session)
    good: set[tuple[str, int, str]] = set()
    for batch in batches(leases):
        rows = run(session, _RENEW_LATE if late else _RENEW, given=rows_json(_lease_rows(batch)), seconds=lease_seconds)
        good.update((row.id, row.attempt, row.lease_token) for row in rows)
    return [lease for lease in leases if (lease.task_id, lease.attempt, lease.token) in good]


def _lease_rows(leases: Iterable[Lease]) -> list[dict[str, Any]]:
    return [{"id": lease.task_id, "attempt": lease.attempt, "token": lease.token} for lease in leases]


def finish_task(
    session: Session, lease: Lease, outputs: Mapping[str, str], metrics: Mapping[str, Any], seconds: float
) -> bool:
    """Record one task's result, as `finish_tasks` does; return False if the lease is no longer good.

    Raises
    ------
    ResultError
        If outputs or metrics cannot be recorded.
    """
    return bool(finish_tasks(session, [TaskEnd(lease, outputs, metrics, seconds, {})]))


def finish_tasks(session: Session, ends: Sequence[TaskEnd]) -> list[Lease]:
    """Record tasks' results and everything that follows from them.

    The tasks that waited for them alone are queued, or succeed too if their results are recorded; jobs whose target has
    succeeded by that end, and publish.

    Returns
    -------
    list of Lease
        Those that were good. For the others, nothing was changed.

    Raises
    ------
    ResultError
        If outputs or metrics of one cannot be recorded (`check_end`); then nothing was changed at all.
    """
    for end in ends:
        check_end(end)

    def finish() -> list[Lease]:
        return [lease for batch in batches(ends) for lease in _finish(session, batch)]

    return _shared_or_alone(session, finish)


def _shared_or_alone(session: Session, change: Callable[[], T]) -> T:
    """Make a change while others share the graph; where that does not do, all of it again, alone.

    All, as who waits for the graph must not share it meanwhile: two of them would wait for each other.
    """
    try:
        with trying_shared(session):
            return change()
    except GraphNeededError:
        lock_graph(session)
        return change()


def _finish(session: Session, ends: Sequence[TaskEnd]) -> list[Lease]:
    if not is_alone(session):
        return _finish_at_once(session, ends)
    given = _end_rows(ends)
    rows = {(row.id, row.attempt): row for row in run(session, _FINISH, given=rows_json(given))}
    kept = [end for end in ends if (end.lease.task_id, end.lease.attempt) in rows]
    if not kept:
        return []
    keys = {end.lease.task_id: rows[end.lease.task_id, end.lease.attempt].key for end in kept}
    if is_postgres(session):
        ready = _ready_readers(rows.values())
    else:
        good = [each for each in given if (each["id"], each["attempt"]) in rows]
        recorded = rows_json([each | rows[each["id"], each["attempt"]]._asdict() for each in good])
        send(session, _RECORD, given=recorded)
        send(session, _TIME, given=recorded)
        ready = count_down(session, list(keys))
    _note_finished(session, kept)
    statement, given_tasks = look_around(list(keys))
    draw_consequences(session, keys, ready, run(session, statement, **given_tasks))
    return [end.lease for end in kept]


def _ready_readers(rows: Iterable[Any]) -> list[Ready]:
    """Return what is ready by the success of tasks, from the rows that `_FINISH` gives on Postgres."""
    return next((ready_readers(row.ready) for row in rows if row.ready is not None), [])


def _finish_at_once(session: Session, ends: Sequence[TaskEnd]) -> list[Lease]:
    """Finish tasks and look around in one round trip, which is right if all leases are good.

    Raises
    ------
    GraphNeededError
        If one is not: then all is undone, and done again with the others.
    """
    finish = (_FINISH, {"given": rows_json(_end_rows(ends))})
    tasks = [end.lease.task_id for end in ends]
    rows, around = run_together(session, finish, look_around(tasks))
    if len(rows) < len(ends):
        need_graph(session)
    _note_finished(session, ends)
    draw_consequences(session, {row.id: row.key for row in rows}, _ready_readers(rows), around)
    return [end.lease for end in ends]


def _note_finished(session: Session, ends: Sequence[TaskEnd]) -> None:
    for end in ends:
        data = {"seconds": end.seconds, **end.ran}
        record_event(session, TaskEvent.FINISH, task=end.lease.task_id, attempt=end.lease.attempt, data=data)


def _end_rows(ends: Sequence[TaskEnd]) -> list[dict[str, Any]]:
    rows = _lease_rows(end.lease for end in ends)
    for row, end in zip(rows, ends, strict=True):
        row.update(outputs=dump(dict(end.outputs)), metrics=dump(dict(end.metrics)), ran=dump(dict(end.ran)))
        row.update(seconds=end.seconds, device=str(end.ran.get("device") or "cpu"))
        row.update({name: int(end.ran.get(name) or 0) for name in ("peak_rss_bytes", "peak_gpu_bytes")})
    return rows


def check_end(end: TaskEnd) -> None:
    """Refuse what cannot be recorded.

    Raises
    ------
    ResultError
        If an output is no digest, or the metrics are not JSON of finite numbers.
    """
    task = end.lease.task_id[:12]
    for name, digest in end.outputs.items():
        if not isinstance(digest, str) or len(digest) != 64:
            raise ResultError(f"task {task}: got output {name}={digest!r}, wanted a sha256 digest")
    try:
        canonical_json(dict(end.metrics)).encode()
    except (TypeError, ValueError) as error:
        raise ResultError(f"task {task}: metrics cannot be recorded as JSON ({error})") from error


def fail_task(session: Session, lease: Lease, *, fault: str, error: str, lost: Sequence[str] = ()) -> bool:
    """Record that an attempt failed: the task runs again after a while, or has failed for good, and its jobs with it.

    Parameters
    ----------
    fault
        "task" (its own), "infrastructure" (a worker, node or store was lost), "memory" (device's or host's ran out: the
        next attempt is alone, with half the batch where that is free), "refused" (by a node that is not fit for it),
        "deadline" (it ran for longer than it may: its own, but the infrastructure's if that has no fault yet),
        "invalid" (bad input, final) or "lost" (a blob that it reads): then what gave the blob runs again, and the task
        after it (`orchestrator.db.repair`).
    error
        One line for people.
    lost
        For a "lost" one the blob, first, and the trees in which it is listed.

    Returns
    -------
    bool
        False if the lease is no longer good; then nothing was changed.
    """
    lock_graph(session)
    if fault == "deadline":
        # What took too long may do so on any node; the first time, it may have been the node.
        before = session.scalar(select(Task.faults_infrastructure).where(*held(lease)))
        fault = "task" if before else "infrastructure"
    if fault == "lost":
        return repair_lost(session, lease, lost, _storable(error))
    return _fault(session, lease.task_id, held(lease), TaskEvent.RETRY, fault, error)


def _fault(
    session: Session, task: str, where: Sequence[ColumnElement[bool]], retry: TaskEvent, fault: str, error: str
) -> bool:
    """Count a fault, and retry the task or fail it."""
    counter, backoff = FAULTS[fault]
    error = _storable(error)
    values: dict[str, Any] = {counter.key: counter + 1, "error": error}
    if fault == "memory":
        values |= after_out_of_memory()
    returning = (Task.attempt, counter.label("faults"))
    if backoff:
        delay = case(dict(enumerate(backoff)), value=counter)
        statement = move_task(retry).where(*where, counter < len(backoff))
        statement = statement.values(**values, not_before=epoch_seconds() + delay)
        row = session.execute(statement.returning(*returning)).one_or_none()
        if row is not None:
            data = {"fault": fault, "faults": row.faults, "delay": backoff[row.faults - 1], "error": error}
            record_event(session, retry, task=task, attempt=row.attempt, data=data)
            send_back(session, [task])
            return True
    row = session.execute(move_task(TaskEvent.FAIL).where(*where).values(**values).returning(*returning)).one_or_none()
    if row is None:
        return False
    data = {"fault": fault, "faults": row.faults, "error": error}
    record_event(session, TaskEvent.FAIL, task=task, attempt=row.attempt, data=data)
    fail_jobs_that_need(session, task, error)
    return True


def _storable(error: str) -> str:
    """Return the text as every database takes it: no NUL, no half characters, not endless."""
    return error.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()[:_ERROR_CHARACTERS]


def release_task(session: Session, lease: Lease, reason: str | None = None) -> bool:
    """Give a task back unfinished, to be claimed by anyone at once; counts as no fault. False: the lease was lost.

    `reason` is what was out, in one line; None: the holder ends.
    """
    return bool(release_tasks(session, [lease], reason))


def release_tasks(session: Session, leases: Sequence[Lease], reason: str | None = None) -> list[Lease]:
    """Give tasks back, as `release_task` does; return the leases that were good."""
    data = {} if reason is None else {"error": _storable(reason)}

    def release() -> set[tuple[str, int]]:
        return {each for batch in batches(leases) for each in _release(session, batch, data)}

    released = _shared_or_alone(session, release)
    if released:
        notify_others(session)
    return [lease for lease in leases if (lease.task_id, lease.attempt) in released]


def _release(session: Session, leases: Sequence[Lease], data: Mapping[str, Any]) -> set[tuple[str, int]]:
    released = {(row.id, row.attempt) for row in run(session, _RELEASE, given=rows_json(_lease_rows(leases)))}
    for task, attempt in sorted(released):
        record_event(session, TaskEvent.RELEASE, task=task, attempt=attempt, data=data)
    if released:
        send_back(session, [task for task, _ in released])
    return released


def reap_expired(session: Session) -> list[str]:
    """Take back the tasks whose leases ran out, as faults of the infrastructure; return their ids."""
    late = (_RUNNING, Task.lease_until <= epoch_seconds())
    if session.scalar(select(Task.id).where(*late).limit(1)) is None:
        return []
    lock_graph(session)
    reaped: list[str] = []
    for row in session.execute(select(Task.id, Task.attempt, Task.lease_owner).where(*late).order_by(Task.seq)).all():
        error = f"the lease of {row.lease_owner} on attempt {row.attempt} ran out"
        same = (*late, Task.id == row.id, Task.attempt == row.attempt)
        if _fault(session, row.id, same, TaskEvent.EXPIRE, "infrastructure", error):
            reaped.append(row.id)
    return reaped
