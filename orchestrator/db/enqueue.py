"""Putting a task graph into the queue, and a job's tasks back into it.

The graph streams in: a batch is read from the planner and inserted before the next is planned. What is new is
invisible to others until the transaction commits, so only the last step, which looks at tasks that other jobs share,
needs `lock_graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.lineage import input_edges
from orchestrator.db.models import Job, JobTask, Task, TaskInput, in_states
from orchestrator.db.promote import complete, recount
from orchestrator.db.rows import EnqueueCounts
from orchestrator.db.session import lock_enqueue, lock_graph, record_event
from orchestrator.db.statements import batches, insert_or_ignore, move_job, move_task
from orchestrator.errors import GraphError, NotFoundError
from orchestrator.graph import TaskNode, inputs_json
from orchestrator.states import ACTIVE_JOBS, UNFINISHED_TASKS, JobEvent, TaskEvent, TaskState
from quant_spec.errors import InvalidInputError


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
    priority = _active_priority(session, job_id)
    seen: set[str] = set()
    for batch in batches(nodes):
        _add(session, job_id, priority, _unseen(batch, seen))
    if target.id not in seen:
        raise GraphError(f"graph of job {job_id}: got no target {target.id[:12]} among {len(seen)} tasks")
    statement = update(Job).where(Job.id == job_id).values(target_task=target.id)
    session.execute(statement, execution_options={"synchronize_session": False})
    lock_graph(session)
    start_tasks(session, job_id)
    cached = JobTask.cached
    total, done = session.execute(
        select(func.count(), func.count().filter(cached)).where(JobTask.job_id == job_id)
    ).one()
    return EnqueueCounts(total, done)


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
    succeeded = select(Task.id).where(Task.id.in_(wanted), in_states(Task.state, [TaskState.SUCCEEDED]))
    session.execute(
        update(JobTask).where(JobTask.job_id == job_id, JobTask.task_id.in_(succeeded)).values(cached=True),
        execution_options=plain,
    )
    target = select(Job.target_task).where(Job.id == job_id).scalar_subquery()
    done = list(session.scalars(succeeded.where(Task.id == target)))
    complete(session, done, recount(session, job_id))
    _start_job(session, job_id)


def _start_job(session: Session, job_id: str) -> None:
    """A job that joins tasks which are running already has begun."""
    running = (
        select(Task.id)
        .join(JobTask, JobTask.task_id == Task.id)
        .where(JobTask.job_id == job_id, in_states(Task.state, [TaskState.RUNNING]))
    )
    statement = move_job(JobEvent.START).where(Job.id == job_id, running.exists()).values(started_at=epoch_seconds())
    if session.scalars(statement.returning(Job.id)).one_or_none() is not None:
        record_event(session, JobEvent.START, job=job_id)


def _active_priority(session: Session, job_id: str) -> int:
    row = session.execute(select(Job.priority, Job.state).where(Job.id == job_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"job: got {job_id!r}, wanted one of jobs ls")
    if row.state not in ACTIVE_JOBS:
        raise InvalidInputError(f"job {job_id}: got state {row.state}, wanted one that has not ended")
    return int(row.priority)


def _unseen(batch: Sequence[TaskNode], seen: set[str]) -> list[TaskNode]:
    """Drop repetitions, and see to it that each task comes after those that it reads."""
    new: list[TaskNode] = []
    for node in batch:
        if missing := node.sources() - seen:
            raise GraphError(
                f"task {node.id[:12]} ({node.label or node.kind}): reads {sorted(missing)[0][:12]}, "
                "wanted a task that came before it"
            )
        if node.id not in seen:
            seen.add(node.id)
            new.append(node)
    return new


def _add(session: Session, job_id: str, priority: int, nodes: Sequence[TaskNode]) -> None:
    # Only enqueueing adds tasks, under its own lock, and nothing removes them: what is absent now stays absent.
    ids = [node.id for node in nodes]
    present = set(session.scalars(select(Task.id).where(Task.id.in_(ids))))
    new = [node for node in nodes if node.id not in present]
    if new:
        session.execute(insert(Task), [_task_values(node, priority) for node in new])
    edges = [edge for node in new for edge in input_edges(node)]
    if edges:
        session.execute(insert(TaskInput), edges)
    insert_or_ignore(session, JobTask, [{"job_id": job_id, "task_id": each, "cached": False} for each in ids])


def _task_values(node: TaskNode, priority: int) -> dict[str, Any]:
    return {
        "id": node.id,
        "kind": node.kind,
        "version": node.version,
        "params": dict(node.params),
        "inputs": inputs_json(node.inputs),
        "cpus": node.resources.cpus,
        "gpus": node.resources.gpus,
        "memory_bytes": node.resources.memory_bytes,
        "work": node.work,
        "label": node.label,
        "state": TaskState.BLOCKED.value,
        "waiting": len(node.sources()),
        "priority": priority,
        "not_before": 0.0,
        "attempt": 0,
        "faults_task": 0,
        "faults_infrastructure": 0,
    }
