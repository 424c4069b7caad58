"""Repair by lineage: a result whose bytes were lost is withdrawn, and the task that gave it runs again.

Who reads it and has not run waits for it; who has run keeps its result. A repaired task may give other bytes than
before (on another type of device): what it reads from is looked up anew when it is ready, as at the first time, and so
are the inputs of those that wait. All of it runs under `lock_graph`, in the transaction that learned of the loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

from sqlalchemy import Row, Table, bindparam, delete, func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.job_ends import end_jobs, fail_jobs_that_need
from orchestrator.db.lineage import is_outdated, makers, referring_inputs
from orchestrator.db.models import Event, Job, JobTask, Json, Model, Result, Task, TaskInput, in_states
from orchestrator.db.promote import start
from orchestrator.db.references import recipe_files
from orchestrator.db.rows import Lease
from orchestrator.db.session import need_graph, record_event
from orchestrator.db.statements import batches, held, move_task
from orchestrator.states import ACTIVE_JOBS, JobEvent, TaskEvent, TaskState

#: How often one task is repaired for one job, whatever blobs were lost: a task whose bytes differ every time would run
#: for ever on a store that keeps nothing.
REPAIRS = 3

_PLAIN = {"synchronize_session": False}


def repair_lost(session: Session, lease: Lease, lost: Sequence[str], error: str) -> bool:
    """Send back a task that met a lost blob: it waits until the blob has been made again.

    Once for each blob and try of a job: one that meets the loss again fails. So does one that needs a blob which no
    task gives.

    Parameters
    ----------
    lease
        Of the task that read.
    lost
        The blob, first, and the trees in which it is listed.
    error
        What the reader said, one line.

    Returns
    -------
    bool
        False if the lease is no longer good; then nothing was changed.
    """
    columns = (Task.id, Task.attempt, Task.kind, Task.label, Task.inputs)
    reader = session.execute(select(*columns).where(*held(lease))).one_or_none()
    if reader is None:
        return False
    found = makers(session, [reader.id], lost)
    waiting: list[str] = []
    if found:
        # A report that was held up, as by a database that was out, may be of a loss that has been mended since.
        if not _is_made_since(session, reader, lost[0]):
            _fail_worn_out(session, reader, found, lost[0])
            if session.scalar(select(Task.id).where(*held(lease))) is None:
                # No job is left that wants the reader.
                return True
            waiting = withdraw(session, found, lost[0])
    elif not _is_being_made(session, reader.id) and not is_outdated(session, reader.id, reader.inputs):
        _fail_for_good(session, lease, reader, _what_to_do(session, reader, lost, error))
        return True
    _move(session, TaskEvent.WAIT, held(lease), {"lost": lost[0], "error": error})
    settle(session, [*waiting, reader.id])
    return True


def withdraw(session: Session, keys: Iterable[str], blob: str) -> list[str]:
    """Forget results, as a blob of theirs was lost; call under `lock_graph`, and `settle` what is returned.

    The tasks that gave them are blocked again where an active job wants them, else cancelled, to be revived by the
    next job that does.

    Returns
    -------
    list of str
        The tasks that are blocked now: those that run again, and those that read from them and have not run.
    """
    repaired: list[tuple[str, int]] = []
    for batch in batches(keys):
        session.execute(delete(Result).where(Result.key.in_(batch)), execution_options=_PLAIN)
        statement = (
            move_task(TaskEvent.REPAIR)
            .where(Task.key.in_(batch))
            .values(repairs=Task.repairs + 1, faults_task=0, faults_infrastructure=0)
            .values(not_before=0.0, finished_at=None, error=None)
        )
        repaired += [(row.id, row.attempt) for row in session.execute(statement.returning(Task.id, Task.attempt))]
    tasks = [task for task, _ in repaired]
    _restore_inputs(session, tasks)
    jobs = _active_jobs(session, tasks)
    for task, attempt in repaired:
        for job in jobs.get(task, [None]):
            record_event(session, TaskEvent.REPAIR, job=job, task=task, attempt=attempt, data={"digest": blob})
    wanted = [task for task in tasks if task in jobs]
    _want_again(session, wanted)
    unwanted = [task for task in tasks if task not in jobs]
    for batch in batches(unwanted):
        _move(session, TaskEvent.CANCEL, (Task.id.in_(batch),), {})
    return [*wanted, *_readers(session, wanted)]


def send_back(session: Session, tasks: Sequence[str]) -> None:
    """Block those of some queued tasks whose sources have been withdrawn while they ran; the graph must be had alone.

    Raises
    ------
    GraphNeededError
        If it is only shared and there are such tasks.
    """
    source = cast(Table, Task.__table__).alias("source")
    undone = (
        select(Task.id)
        .distinct()
        .join(TaskInput, TaskInput.task_seq == Task.seq)
        .join(source, source.c.seq == TaskInput.source_seq)
        .where(Task.id.in_(tasks), source.c.state != TaskState.SUCCEEDED.value)
    )
    waiting = list(session.scalars(undone))
    if waiting:
        need_graph(session)
        _move(session, TaskEvent.WAIT, (in_states(Task.state, [TaskState.QUEUED]), Task.id.in_(waiting)), {})
        settle(session, waiting)


def settle(session: Session, blocked: Sequence[str]) -> None:
    """Let tasks that were blocked by a repair wait for what they read, and start those that have all of it."""
    tasks = list(dict.fromkeys(blocked))
    _restore_inputs(session, tasks)
    source = cast(Table, Task.__table__).alias("source")
    missing = (
        select(func.count())
        .select_from(TaskInput)
        .join(source, source.c.seq == TaskInput.source_seq)
        .where(TaskInput.task_seq == Task.seq, source.c.state != TaskState.SUCCEEDED.value)
        .scalar_subquery()
    )
    ready: list[str] = []
    for batch in batches(tasks):
        statement = (
            update(Task)
            .where(in_states(Task.state, [TaskState.BLOCKED]), Task.id.in_(batch))
            .values(waiting=missing)
            .returning(Task.seq, Task.id, Task.waiting)
        )
        rows = session.execute(statement, execution_options=_PLAIN).all()
        ready += [row.id for row in sorted(rows, key=lambda row: row.seq) if row.waiting == 0]
    start(session, ready)


def _readers(session: Session, repaired: Sequence[str]) -> list[str]:
    """Block the queued tasks that read from repaired ones; return them, and those that are blocked already."""
    found: list[str] = []
    for batch in batches(repaired):
        sources = select(Task.seq).where(Task.id.in_(batch))
        reading = select(TaskInput.task_seq).where(TaskInput.source_seq.in_(sources))
        _move(session, TaskEvent.WAIT, (in_states(Task.state, [TaskState.QUEUED]), Task.seq.in_(reading)), {})
        blocked = (in_states(Task.state, [TaskState.BLOCKED]), Task.seq.in_(reading))
        found += session.scalars(select(Task.id).where(*blocked))
    return found


def _restore_inputs(session: Session, tasks: Sequence[str]) -> None:
    """Put references back in place of the digests that tasks were promoted with; their keys are unknown again."""
    if not tasks:
        return
    # A statement on the table, not the class: the class would take a list of parameters for rows by primary key.
    table = cast(Table, Task.__table__)
    statement = (
        update(table)
        .where(table.c.id == bindparam("b_id"), in_states(table.c.state, [TaskState.BLOCKED]))
        .values(key=None, inputs=bindparam("b_inputs", type_=Json))
    )
    inputs = referring_inputs(session, tasks)
    session.connection().execute(statement, [{"b_id": task, "b_inputs": each} for task, each in inputs.items()])


def _active_jobs(session: Session, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Return the active jobs that want each of some tasks; a task that none wants is missing."""
    found: dict[str, list[str]] = {}
    for batch in batches(tasks):
        statement = (
            select(JobTask.task_id, Job.id)
            .join(Job, Job.id == JobTask.job_id)
            .where(JobTask.task_id.in_(batch), in_states(Job.state, ACTIVE_JOBS))
            .order_by(Job.id)
        )
        for row in session.execute(statement):
            found.setdefault(row.task_id, []).append(row.id)
    return found


def _want_again(session: Session, tasks: Sequence[str]) -> None:
    """Give repaired tasks the priority of the jobs that want them, which are about to compute them."""
    for batch in batches(tasks):
        active = select(Job.id).where(in_states(Job.state, ACTIVE_JOBS))
        priority = (
            select(func.max(Job.priority))
            .join(JobTask, JobTask.job_id == Job.id)
            .where(JobTask.task_id == Task.id, in_states(Job.state, ACTIVE_JOBS))
            .scalar_subquery()
        )
        session.execute(update(Task).where(Task.id.in_(batch)).values(priority=priority), execution_options=_PLAIN)
        theirs = (JobTask.task_id.in_(batch), JobTask.job_id.in_(active))
        session.execute(update(JobTask).where(*theirs).values(cached=False), execution_options=_PLAIN)


def _move(session: Session, event: TaskEvent, where: Sequence[Any], data: dict[str, Any]) -> None:
    """Apply an event to tasks, and note it."""
    for row in session.execute(move_task(event).where(*where).returning(Task.id, Task.attempt)).all():
        record_event(session, event, task=row.id, attempt=row.attempt, data=data)


def _is_made_since(session: Session, reader: Row[Any], blob: str) -> bool:
    """Say whether a blob was made again since the reader's attempt began, which may have met it before."""
    of_reader = (Event.task_id == reader.id, Event.event == TaskEvent.CLAIM.value, Event.attempt == reader.attempt)
    begun = session.scalar(select(func.max(Event.id)).where(*of_reader))
    if begun is None:
        return False
    since = select(Event.data).where(Event.event == TaskEvent.REPAIR.value, Event.id > begun)
    return any(data["digest"] == blob for data in session.scalars(since))


def _is_being_made(session: Session, task: str) -> bool:
    """Say whether something that a task reads is not there now: another reader met the loss before it."""
    reader = select(Task.seq).where(Task.id == task).scalar_subquery()
    sources = select(TaskInput.source_seq).where(TaskInput.task_seq == reader)
    undone = select(Task.id).where(Task.seq.in_(sources), Task.state != TaskState.SUCCEEDED.value)
    return session.scalar(undone.limit(1)) is not None


def _fail_worn_out(session: Session, reader: Row[Any], keys: Collection[str], blob: str) -> None:
    """Fail the jobs for which this blob was made again before, or its task often enough, since they were last retried.

    Who retries a job has mended the store.
    """
    makers_of = select(Task.id, Task.kind, Task.label).where(Task.key.in_(keys)).order_by(Task.seq)
    tasks = {row.id: _name(row.kind, row.label) for row in session.execute(makers_of)}
    worn: list[str] = []
    for job in _active_jobs(session, [reader.id]).get(reader.id, []):
        of_job = select(Event.task_id, Event.data).where(Event.job_id == job)
        retried = (Event.job_id == job, Event.task_id.is_(None), Event.event == JobEvent.RETRY.value)
        since = session.scalar(select(func.max(Event.id)).where(*retried)) or 0
        rows = session.execute(of_job.where(Event.event == TaskEvent.REPAIR.value, Event.id > since)).all()
        again = any(row.data["digest"] == blob and row.task_id in tasks for row in rows)
        often = any(sum(row.task_id == task for row in rows) >= REPAIRS for task in tasks)
        worn += [job] if again or often else []
    if worn:
        name, maker = _name(reader.kind, reader.label), next(iter(tasks.values()))
        error = (
            f"{name}: got no blob {blob} once more, after {maker} had made it again; wanted a store that "
            "keeps what is written (quantmill doctor)"
        )
        end_jobs(session, worn, JobEvent.FAIL, error)


def _fail_for_good(session: Session, lease: Lease, reader: Row[Any], error: str) -> None:
    """Fail a task that needs what nobody can make again, and every job that wants it."""
    session.execute(move_task(TaskEvent.FAIL).where(*held(lease)).values(error=error))
    data = {"fault": "lost", "error": error}
    record_event(session, TaskEvent.FAIL, task=reader.id, attempt=reader.attempt, data=data)
    fail_jobs_that_need(session, reader.id, error)


def _what_to_do(session: Session, reader: Row[Any], lost: Sequence[str], error: str) -> str:
    """Return what to say of a lost blob that no task gives."""
    name, then = _name(reader.kind, reader.label), "then jobs retry"
    model = session.scalars(select(Model).where(Model.digest.in_(lost)).order_by(Model.created_at).limit(1)).first()
    if model is not None:
        again = f"quantmill models add {model.source} --name {model.name}"
        return f"{name}: {error}; it is part of the model {model.name}, wanted it added again: {again}, {then}"
    wanting = select(Job.recipe).join(JobTask, JobTask.job_id == Job.id).where(JobTask.task_id == reader.id)
    if set(lost) & {digest for recipe in session.scalars(wanting) for digest in recipe_files(recipe)}:
        again = "submit the recipe again where its file is"
        return (
            f"{name}: {error}; it is a file that the recipe names (extractor_weights, clip, lpips, prompts), {again}, "
            f"{then}"
        )
    return f"{name}: {error}; no task gives it"


def _name(kind: str, label: str) -> str:
    return f"{kind} ({label})" if label else kind
