"""The queue: leases on tasks, and what becomes of the tasks.

Contract, the same on SQLite and Postgres, for any number of orchestrators:

* a task is held by at most one lease, and a key by at most one task at a time;
* a lease is (task, attempt, token); attempts only grow. Whatever is done with a lease that ran out or was taken away
  returns False and changes nothing;
* a result, its task's success, the tasks it unblocks and the jobs it ends become visible together or not at all;
* faults of a task's own and of the infrastructure under it are counted apart; a lease given back counts as neither.

Claims skip rows that another transaction holds. Everything else that touches running tasks holds `lock_graph`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, case, exists, literal_column, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.job_ends import fail_jobs_that_need
from orchestrator.db.models import Job, JobTask, KindTiming, Result, Task, in_states
from orchestrator.db.promote import complete, mark_twins_cached
from orchestrator.db.rows import ClaimedTask, Lease
from orchestrator.db.session import lock_graph, record_event
from orchestrator.db.statements import batches, held, insert_into, insert_or_ignore, move_job, move_task
from orchestrator.errors import ResultError
from orchestrator.graph import Resources
from orchestrator.states import JobEvent, JobState, TaskEvent, TaskState
from quant_spec.keys import canonical_json

#: Seconds to wait after the 1st, 2nd, ... fault of a task's own before it runs again; one more fault is final.
TASK_BACKOFF = (2.0, 4.0)
#: The same for faults of the infrastructure: a lost worker, node, lease or store.
INFRASTRUCTURE_BACKOFF = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0)

#: Fault to its counter and backoff. "invalid" is bad input, which no retry mends; it counts as the task's own.
FAULTS: Mapping[str, tuple[Any, tuple[float, ...]]] = {
    "task": (Task.faults_task, TASK_BACKOFF),
    "infrastructure": (Task.faults_infrastructure, INFRASTRUCTURE_BACKOFF),
    "invalid": (Task.faults_task, ()),
}

_ERROR_CHARACTERS = 10_000
_ZERO: ColumnElement[float] = literal_column("0")
_QUEUED = in_states(Task.state, [TaskState.QUEUED])
_RUNNING = in_states(Task.state, [TaskState.RUNNING])


def claim_tasks(
    session: Session, *, owner: str, limit: int, lease_seconds: float, capacity: Resources | None = None
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
    capacity
        What the claimed tasks may occupy together; one that does not fit is passed over. None: no bound.

    Notes
    -----
    O(limit · log n): it reads the head of a partial index. A task whose key is running under another id is left
    queued; it succeeds when that one does.
    """
    chosen = _choose(session, limit, capacity)
    if not chosen:
        return []
    token = secrets.token_hex(16)
    claimed = _claim(session, chosen, owner, lease_seconds, token)
    if claimed is None:
        # Someone else claimed one of these keys under another id between our two statements: find out which.
        claimed = [row for each in chosen for row in _claim(session, [each], owner, lease_seconds, token) or ()]
    order = {task: position for position, task in enumerate(chosen)}
    claimed = sorted(claimed, key=lambda row: order[row.id])
    for row in claimed:
        record_event(session, TaskEvent.CLAIM, task=row.id, attempt=row.attempt, data={"owner": owner})
    _start_jobs(session, [row.id for row in claimed])
    return [_claimed_task(row, token) for row in claimed]


def claim_candidates(limit: int, capacity: Resources | None) -> Any:
    """Return the statement that finds what can be claimed, best first."""
    other = aliased(Task)
    same_key = exists().where(other.key == Task.key, in_states(other.state, [TaskState.RUNNING]))
    where: list[ColumnElement[bool]] = [_QUEUED, Task.not_before <= epoch_seconds(), ~same_key]
    if capacity is not None:
        # A literal 0, so that a machine without GPU reads the index that has no GPU tasks in it.
        where.append(Task.gpus <= capacity.gpus if capacity.gpus > 0 else Task.gpus == _ZERO)
        where += [Task.cpus <= capacity.cpus, Task.memory_bytes <= capacity.memory_bytes]
    return (
        select(Task.id, Task.key, Task.cpus, Task.gpus, Task.memory_bytes)
        .where(*where)
        .order_by(Task.priority.desc(), Task.seq)
        .limit(limit)
        .with_for_update(of=Task, skip_locked=True, key_share=True)
    )


def _choose(session: Session, limit: int, capacity: Resources | None) -> list[str]:
    """Lock candidates and keep those that fit together, one of each key."""
    chosen: dict[str, str] = {}
    cpus, gpus, memory = 0.0, 0.0, 0
    for row in session.execute(claim_candidates(limit, capacity)):
        fits = capacity is None or (
            cpus + row.cpus <= capacity.cpus
            and gpus + row.gpus <= capacity.gpus
            and memory + row.memory_bytes <= capacity.memory_bytes
        )
        if fits and row.key not in chosen:
            chosen[row.key] = row.id
            cpus, gpus, memory = cpus + row.cpus, gpus + row.gpus, memory + row.memory_bytes
    return list(chosen.values())


def _claim(
    session: Session, tasks: Sequence[str], owner: str, lease_seconds: float, token: str
) -> Sequence[Row[Any]] | None:
    """Set leases; None, and nothing changed, if one of the keys is running by now."""
    statement = (
        move_task(TaskEvent.CLAIM)
        .where(Task.id.in_(tasks))
        .values(attempt=Task.attempt + 1, lease_token=token, lease_owner=owner, started_at=epoch_seconds())
        .values(lease_until=epoch_seconds() + lease_seconds)
        .returning(
            Task.id, Task.attempt, Task.kind, Task.version, Task.params, Task.inputs,
            Task.cpus, Task.gpus, Task.memory_bytes, Task.work, Task.label, Task.deadline_seconds,
        )
    )  # fmt: skip
    try:
        with session.begin_nested():
            return session.execute(statement).all()
    except IntegrityError:
        return None


def _start_jobs(session: Session, tasks: Sequence[str]) -> None:
    """Note that jobs have begun. One that another transaction holds is begun, or ended, by that: no claim waits."""
    if not tasks:
        return
    wanting = select(JobTask.job_id).where(JobTask.task_id.in_(tasks))
    waiting = select(Job.id).where(in_states(Job.state, [JobState.QUEUED]), Job.id.in_(wanting))
    waiting = waiting.with_for_update(skip_locked=True, key_share=True)
    statement = move_job(JobEvent.START).where(Job.id.in_(waiting))
    for job in session.scalars(statement.values(started_at=epoch_seconds()).returning(Job.id)).all():
        record_event(session, JobEvent.START, job=job)


def _claimed_task(row: Row[Any], token: str) -> ClaimedTask:
    return ClaimedTask(
        lease=Lease(row.id, row.attempt, token),
        kind=row.kind,
        version=row.version,
        params=row.params,
        inputs=row.inputs,
        resources=Resources(row.cpus, row.gpus, row.memory_bytes),
        work=row.work,
        label=row.label,
        deadline_seconds=row.deadline_seconds,
    )


def renew_leases(session: Session, leases: Sequence[Lease], lease_seconds: float, *, late: bool = False) -> list[Lease]:
    """Let leases last `lease_seconds` from now; return those that are still good, in the order given.

    The others ran out, or no job wants their tasks any more: their holders should stop. With `late`, one that ran out
    and that nobody has taken back yet is good again: the database itself may have been out.
    """
    lock_graph(session)
    on_time = [] if late else [Task.lease_until > epoch_seconds()]
    good: set[tuple[str, int, str]] = set()
    for batch in batches(leases, 200):
        names = [(lease.task_id, lease.attempt, lease.token) for lease in batch]
        statement = (
            update(Task)
            .where(_RUNNING, Task.id.in_([lease.task_id for lease in batch]), *on_time)
            .where(tuple_(Task.id, Task.attempt, Task.lease_token).in_(names))
            .values(lease_until=epoch_seconds() + lease_seconds)
            .returning(Task.id, Task.attempt, Task.lease_token)
            .execution_options(synchronize_session=False)
        )
        good.update((row.id, row.attempt, row.lease_token) for row in session.execute(statement))
    return [lease for lease in leases if (lease.task_id, lease.attempt, lease.token) in good]


def finish_task(
    session: Session, lease: Lease, outputs: Mapping[str, str], metrics: Mapping[str, Any], seconds: float
) -> bool:
    """Record a task's result and everything that follows from it.

    The tasks that waited for it alone are queued, or succeed too if their results are recorded; jobs whose target has
    succeeded by that end, and publish.

    Parameters
    ----------
    outputs
        Names to digests of bytes that are in the store.
    metrics
        JSON; numbers must be finite.
    seconds
        How long the task computed.

    Returns
    -------
    bool
        False if the lease is no longer good; then nothing was changed.

    Raises
    ------
    ResultError
        If outputs or metrics cannot be recorded.
    """
    _check_result(lease, outputs, metrics)
    lock_graph(session)
    row = session.execute(
        move_task(TaskEvent.FINISH)
        .where(*held(lease))
        .values(error=None)
        .returning(Task.key, Task.kind, Task.version, Task.work)
    ).one_or_none()
    if row is None:
        return False
    result = {"key": row.key, "kind": row.kind, "outputs": dict(outputs), "metrics": dict(metrics), "seconds": seconds}
    insert_or_ignore(session, Result, [{**result, "created_at": session.scalar(select(epoch_seconds()))}])
    _add_timing(session, {"kind": row.kind, "version": row.version, "work": row.work, "seconds": seconds})
    data = {"seconds": seconds}
    record_event(session, TaskEvent.FINISH, task=lease.task_id, attempt=lease.attempt, data=data)
    complete(session, [lease.task_id, *mark_twins_cached(session, row.key)])
    return True


def _check_result(lease: Lease, outputs: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    for name, digest in outputs.items():
        if not isinstance(digest, str) or len(digest) != 64:
            raise ResultError(f"task {lease.task_id[:12]}: got output {name}={digest!r}, wanted a sha256 digest")
    try:
        canonical_json(dict(metrics)).encode()
    except (TypeError, ValueError) as error:
        raise ResultError(f"task {lease.task_id[:12]}: metrics cannot be recorded as JSON ({error})") from error


def _add_timing(session: Session, values: Mapping[str, Any]) -> None:
    statement = insert_into(session, KindTiming).values(**values, n=1)
    new = {name: getattr(KindTiming, name) + statement.excluded[name] for name in ("n", "seconds", "work")}
    session.execute(statement.on_conflict_do_update(index_elements=["kind", "version", "device"], set_=new))


def fail_task(session: Session, lease: Lease, *, fault: str, error: str) -> bool:
    """Record that an attempt failed: the task runs again after a while, or has failed for good, and its jobs with it.

    Parameters
    ----------
    fault
        "task" (its own), "infrastructure" (a worker, node or store was lost) or "invalid" (bad input, final).
    error
        One line for people.

    Returns
    -------
    bool
        False if the lease is no longer good; then nothing was changed.
    """
    lock_graph(session)
    return _fault(session, lease.task_id, held(lease), TaskEvent.RETRY, fault, error)


def _fault(
    session: Session, task: str, where: Sequence[ColumnElement[bool]], retry: TaskEvent, fault: str, error: str
) -> bool:
    """Count a fault, and retry the task or fail it."""
    counter, backoff = FAULTS[fault]
    error = _storable(error)
    values: dict[str, Any] = {counter.key: counter + 1, "error": error}
    returning = (Task.attempt, counter.label("faults"))
    if backoff:
        delay = case(dict(enumerate(backoff)), value=counter)
        statement = move_task(retry).where(*where, counter < len(backoff))
        statement = statement.values(**values, not_before=epoch_seconds() + delay)
        row = session.execute(statement.returning(*returning)).one_or_none()
        if row is not None:
            data = {"fault": fault, "faults": row.faults, "delay": backoff[row.faults - 1], "error": error}
            record_event(session, retry, task=task, attempt=row.attempt, data=data)
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
    lock_graph(session)
    statement = move_task(TaskEvent.RELEASE).where(*held(lease)).returning(Task.id)
    if session.scalars(statement).one_or_none() is None:
        return False
    data = {} if reason is None else {"error": _storable(reason)}
    record_event(session, TaskEvent.RELEASE, task=lease.task_id, attempt=lease.attempt, data=data)
    return True


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
