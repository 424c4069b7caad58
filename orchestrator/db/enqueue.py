"""Putting a task graph into the queue, and a job's tasks back into it.

The graph streams in: a batch is read from the planner and inserted before the next is planned. What is new is
invisible to others until the transaction commits, so only the last step, which looks at tasks that other jobs share,
needs `lock_graph`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.event_log import record_event
from orchestrator.db.fairness import next_rank, note_rank
from orchestrator.db.lineage import EDGE, read_places
from orchestrator.db.models import Job, JobTask, Task, TaskInput, in_states
from orchestrator.db.promote import queue_new, recount, start
from orchestrator.db.rows import EnqueueCounts
from orchestrator.db.session import lock_enqueue, lock_graph, notify_others
from orchestrator.db.sql import dump, rows_json, run, statement
from orchestrator.db.statements import batches, insert_rows, move_job, move_task
from orchestrator.errors import GraphError, NotFoundError
from orchestrator.graph import TaskNode, inputs_json
from orchestrator.states import ACTIVE_JOBS, UNFINISHED_TASKS, JobEvent, TaskEvent, TaskState
from quant_spec.errors import InvalidInputError
from workers.execution.cluster import MEMORY_STEP, in_steps

# Nodes that are held at once: the more, the fewer statements, each of which costs some.
_AT_ONCE = 4000
_BLOCKED = TaskState.BLOCKED.value
_PRESENT = statement("SELECT tasks.id, tasks.seq FROM {given} JOIN tasks ON tasks.id = given.id", {"id": "text"})
# The number that the first of some new tasks takes; the others follow it. On Postgres all of them are used up then.
_NEXT_SEQ = statement(
    "SELECT coalesce(max(seq), 0) + 1 AS seq FROM tasks",
    postgres="""
    SELECT setval(name, nextval(name) + CAST(:count AS bigint) - 1) - CAST(:count AS bigint) + 1 AS seq
    FROM CAST(pg_get_serial_sequence('tasks', 'seq') AS regclass) AS name
    """,
)


def enqueue_graph(session: Session, job_id: str, nodes: Iterable[TaskNode], target: TaskNode) -> EnqueueCounts:
    """Add a job's tasks, sharing those that exist, and start what can start; the job may end here.

    Parameters
    ----------
    nodes
        The graph, each task after those that it reads; read once, in batches.
    target
        The task that ends the job; one of `nodes`.

    Returns
    -------
    EnqueueCounts
        How many tasks the job has, and how many of them needed no computing.

    Raises
    ------
    GraphError
        If a task refers to one that did not come before it, or the target did not come.
    InvalidInputError
        If the job has ended.
    """
    lock_enqueue(session)
    first = next_rank(session, job_id)
    shared = _of_job(session, job_id, first)
    begun = session.execute(select(JobTask.task_id).where(JobTask.job_id == job_id).limit(1)).first() is not None
    seen: dict[str, int] = {}
    ready: list[str] = []
    is_shared = begun
    for batch in batches(nodes, _AT_ONCE):
        wanted = _unseen(batch, seen)
        new = _add(session, job_id, shared, wanted, seen, begun=begun)
        ready += [item.node.id for item in new if not item.places]
        is_shared = is_shared or len(new) < len(wanted)
    if target.id not in seen:
        raise GraphError(f"graph of job {job_id}: got no target {target.id[:12]} among {len(seen)} tasks")
    update_target = update(Job).where(Job.id == job_id).values(target_task=target.id)
    session.execute(update_target, execution_options={"synchronize_session": False})
    note_rank(session, job_id, next(shared.ranks))
    lock_graph(session)
    queue_new(session, ready)
    if is_shared:
        _bring_forward(session, job_id, first)
        start_tasks(session, job_id)
    notify_others(session)
    cached = JobTask.cached
    total, done = session.execute(
        select(func.count(), func.count().filter(cached)).where(JobTask.job_id == job_id)
    ).one()
    return EnqueueCounts(total, done)


def _bring_forward(session: Session, job_id: str, rank: float) -> None:
    """Let tasks that came with others' jobs wait no longer than this job's own would."""
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    statement = update(Task).where(in_states(Task.state, UNFINISHED_TASKS), Task.id.in_(wanted), Task.rank > rank)
    session.execute(statement.values(rank=rank), execution_options={"synchronize_session": False})


def start_tasks(session: Session, job_id: str) -> None:
    """Want a job's tasks: revive the ended, queue the ready, note the recorded as cached; call under `lock_graph`."""
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    priority = select(Job.priority).where(Job.id == job_id).scalar_subquery()
    revived = session.execute(
        move_task(TaskEvent.REVIVE)
        .where(Task.id.in_(wanted))
        .values(priority=priority, faults_task=0, faults_infrastructure=0, error=None, finished_at=None)
        .returning(Task.id, Task.attempt)
    ).all()
    for row in revived:
        record_event(session, TaskEvent.REVIVE, task=row.id, attempt=row.attempt)
    plain = {"synchronize_session": False}
    session.execute(
        update(Task)
        .where(in_states(Task.state, UNFINISHED_TASKS), Task.id.in_(wanted), Task.priority < priority)
        .values(priority=priority),
        execution_options=plain,
    )
    _share_wishes(session, job_id)
    succeeded = select(Task.id).where(Task.id.in_(wanted), in_states(Task.state, [TaskState.SUCCEEDED]))
    session.execute(
        update(JobTask).where(JobTask.job_id == job_id, JobTask.task_id.in_(succeeded)).values(cached=True),
        execution_options=plain,
    )
    target = select(Job.target_task).where(Job.id == job_id).scalar_subquery()
    done = list(session.scalars(succeeded.where(Task.id == target)))
    start(session, recount(session, job_id), done)
    _start_job(session, job_id)


def _share_wishes(session: Session, job_id: str) -> None:
    """Let tasks that came with another job run where that or this one wants them; deterministic if one of them does."""
    job = _of_job(session, job_id)
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    unfinished = update(Task).where(in_states(Task.state, UNFINISHED_TASKS), Task.id.in_(wanted))
    differs = (Task.device != job.device) | Task.gpu_type.is_distinct_from(job.gpu_type)
    plain = {"synchronize_session": False}
    no_matter = unfinished.where(differs, Task.gpu_memory_bytes > 0).values(device="auto", gpu_type=None, gpus=0.0)
    asked = (Task.cpus, Task.gpus, Task.memory_bytes, Task.gpu_memory_bytes, Task.device, Task.gpu_type)
    groups: dict[str, list[str]] = {}
    for row in session.execute(no_matter.returning(Task.id, *asked), execution_options=plain):
        groups.setdefault(needs_of(*(getattr(row, name) for name in NEEDS)), []).append(row.id)
    for needs, tasks in groups.items():
        for batch in batches(tasks):
            session.execute(update(Task).where(Task.id.in_(batch)).values(needs=needs), execution_options=plain)
    if job.deterministic:
        session.execute(unfinished.values(deterministic=True), execution_options=plain)


def _start_job(session: Session, job_id: str) -> None:
    """A job that joins tasks which are running already has begun."""
    running = (
        select(Task.id)
        .join(JobTask, JobTask.task_id == Task.id)
        .where(JobTask.job_id == job_id, in_states(Task.state, [TaskState.RUNNING]))
    )
    begin = move_job(JobEvent.START).where(Job.id == job_id, running.exists()).values(started_at=epoch_seconds())
    if session.scalars(begin.returning(Job.id)).one_or_none() is not None:
        record_event(session, JobEvent.START, job=job_id)


@dataclass(frozen=True, slots=True)
class _Shared:
    """The values that all tasks have from the job that brings them."""

    priority: int
    device: str
    gpu_type: str | None
    deterministic: bool
    deadline_seconds: float | None
    ranks: Iterator[float]


def _of_job(session: Session, job_id: str, first_rank: float = 0.0) -> _Shared:
    columns = (Job.priority, Job.state, Job.device, Job.gpu_type, Job.recipe)
    row = session.execute(select(*columns).where(Job.id == job_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"job: got {job_id!r}, wanted one of jobs ls")
    if row.state not in ACTIVE_JOBS:
        raise InvalidInputError(f"job {job_id}: got state {row.state}, wanted one that has not ended")
    minutes = (row.recipe.get("resources") or {}).get("task_minutes")
    return _Shared(
        priority=row.priority,
        device=row.device,
        gpu_type=row.gpu_type,
        deterministic=bool(row.recipe.get("deterministic")),
        deadline_seconds=None if minutes is None else 60.0 * minutes,
        ranks=itertools.count(first_rank),
    )


class _Item(NamedTuple):
    """A task of a graph, and what it reads (`lineage.read_places`)."""

    node: TaskNode
    places: dict[str, str]


def _unseen(batch: Sequence[TaskNode], seen: dict[str, int]) -> list[_Item]:
    """Drop repetitions, and see to it that each task comes after those that it reads.

    `seen` are the numbers of tasks by id; those of the batch are not known yet.
    """
    new: list[_Item] = []
    for node in batch:
        places = read_places(node)
        if not places.keys() <= seen.keys():
            raise GraphError(
                f"task {node.id[:12]} ({node.label or node.kind}): reads {min(places.keys() - seen.keys())[:12]}, "
                "wanted a task that came before it"
            )
        if node.id not in seen:
            seen[node.id] = 0
            new.append(_Item(node, places))
    return new


def _add(
    session: Session, job_id: str, shared: _Shared, items: Sequence[_Item], seqs: dict[str, int], *, begun: bool
) -> list[_Item]:
    """Add the tasks that are not there yet, and return them; let the job, which may have some, want all.

    The numbers of all are put into `seqs`.
    """
    # Only enqueueing adds tasks, under its own lock, and nothing removes them: what is absent now stays absent.
    ids = [item.node.id for item in items]
    present = {row.id: row.seq for row in run(session, _PRESENT, given=rows_json([{"id": each} for each in ids]))}
    new = [item for item in items if item.node.id not in present]
    seqs.update(present)
    if new:
        first = run(session, _NEXT_SEQ, count=len(new))[0].seq
        seqs.update((item.node.id, seq) for seq, item in enumerate(new, first))
        values = (_task_values(item, seqs[item.node.id], shared) for item in new)
        insert_rows(session, Task, _TASK, values, same=_same_values(shared))
    if any(item.places for item in new):
        edges = ((seqs[item.node.id], seqs[source], places) for item in new for source, places in item.places.items())
        insert_rows(session, TaskInput, EDGE, edges, same={})
    same = {"job_id": job_id, "cached": False}
    # In their own order, in which an index takes them in twice as fast.
    insert_rows(session, JobTask, ("task_id",), ((each,) for each in sorted(ids)), same=same, maybe=begun)
    return new


#: What a task asks for; the claim reads tasks that ask for the same as one group.
NEEDS = ("cpus", "gpus", "memory_bytes", "gpu_memory_bytes", "device", "gpu_type")
_TASK = (
    *("seq", "id", "kind", "version", "params", "inputs", "cpus", "gpus", "memory_bytes", "gpu_memory_bytes"),
    *("needs", "work", "label", "waiting", "rank"),
)


@lru_cache(maxsize=4096)
def needs_of(
    cpus: float, gpus: float, memory_bytes: int, gpu_memory_bytes: int, device: str, gpu_type: str | None
) -> str:
    """Name what a task asks for, by the values of its columns.

    Memory counts in steps, as for placement: tasks of layers of many sizes would else be as many groups.
    """
    steps = [in_steps(memory) // MEMORY_STEP for memory in (memory_bytes, gpu_memory_bytes)]
    return f"{float(cpus)}/{float(gpus)}/{steps[0]}/{steps[1]}/{device}/{gpu_type}"


def _task_values(item: _Item, seq: int, shared: _Shared) -> tuple[Any, ...]:
    """Return the values of `_TASK`."""
    node, resources = item.node, item.node.resources
    must = shared.device == "cuda" and resources.gpu_memory_bytes > 0
    gpus = max(resources.gpus, 1.0) if must else resources.gpus
    asked = (resources.cpus, gpus, resources.memory_bytes, resources.gpu_memory_bytes)
    return (
        *(seq, node.id, node.kind, node.version, dump(dict(node.params)), dump(inputs_json(node.inputs)), *asked),
        *(needs_of(*asked, shared.device, shared.gpu_type), node.work, node.label, len(item.places)),
        next(shared.ranks),
    )


def _same_values(shared: _Shared) -> dict[str, Any]:
    """Return the columns that have the same values in all new tasks of a job."""
    return {
        "state": _BLOCKED,
        "priority": shared.priority,
        "device": shared.device,
        "gpu_type": shared.gpu_type,
        "deterministic": shared.deterministic,
        "deadline_seconds": shared.deadline_seconds,
        "not_before": 0.0,
        "attempt": 0,
        "faults_task": 0,
        "faults_infrastructure": 0,
    }
