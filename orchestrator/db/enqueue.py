"""Putting a task graph into the queue, and a job's tasks back into it.

The graph streams in: a batch is read from the planner and inserted before the next is planned. What is new is
invisible to others until the transaction commits, so only the last step, which looks at tasks that other jobs share,
needs `lock_graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.event_log import record_event
from orchestrator.db.lineage import input_edges
from orchestrator.db.models import Job, JobTask, Task, TaskInput, in_states
from orchestrator.db.promote import complete, recount
from orchestrator.db.rows import EnqueueCounts
from orchestrator.db.session import lock_enqueue, lock_graph, tell_others
from orchestrator.db.sql import rows_json, run, statement
from orchestrator.db.statements import batches, insert_rows, move_job, move_task
from orchestrator.errors import GraphError, NotFoundError
from orchestrator.graph import TaskNode, inputs_json
from orchestrator.states import ACTIVE_JOBS, UNFINISHED_TASKS, JobEvent, TaskEvent, TaskState
from quant_spec.errors import InvalidInputError

_PRESENT = statement("SELECT tasks.id FROM {given} JOIN tasks ON tasks.id = given.id", {"id": "text"})


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
    shared = _of_job(session, job_id)
    seen: set[str] = set()
    for batch in batches(nodes):
        _add(session, job_id, shared, _unseen(batch, seen))
    if target.id not in seen:
        raise GraphError(f"graph of job {job_id}: got no target {target.id[:12]} among {len(seen)} tasks")
    update_target = update(Job).where(Job.id == job_id).values(target_task=target.id)
    session.execute(update_target, execution_options={"synchronize_session": False})
    lock_graph(session)
    start_tasks(session, job_id)
    tell_others(session)
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
    _share_wishes(session, job_id)
    succeeded = select(Task.id).where(Task.id.in_(wanted), in_states(Task.state, [TaskState.SUCCEEDED]))
    session.execute(
        update(JobTask).where(JobTask.job_id == job_id, JobTask.task_id.in_(succeeded)).values(cached=True),
        execution_options=plain,
    )
    target = select(Job.target_task).where(Job.id == job_id).scalar_subquery()
    done = list(session.scalars(succeeded.where(Task.id == target)))
    complete(session, done, recount(session, job_id))
    _start_job(session, job_id)


def _share_wishes(session: Session, job_id: str) -> None:
    """Let tasks that came with another job run where that or this one wants them; deterministic if one of them does."""
    job = _of_job(session, job_id)
    wanted = select(JobTask.task_id).where(JobTask.job_id == job_id)
    unfinished = update(Task).where(in_states(Task.state, UNFINISHED_TASKS), Task.id.in_(wanted))
    differs = (Task.device != job["device"]) | Task.gpu_type.is_distinct_from(job["gpu_type"])
    plain = {"synchronize_session": False}
    no_matter = unfinished.where(differs, Task.gpu_memory_bytes > 0).values(device="auto", gpu_type=None, gpus=0.0)
    asked = (Task.cpus, Task.gpus, Task.memory_bytes, Task.gpu_memory_bytes, Task.device, Task.gpu_type)
    groups: dict[str, list[str]] = {}
    for row in session.execute(no_matter.returning(Task.id, *asked), execution_options=plain):
        groups.setdefault(needs_of({name: getattr(row, name) for name in NEEDS}), []).append(row.id)
    for needs, tasks in groups.items():
        for batch in batches(tasks):
            session.execute(update(Task).where(Task.id.in_(batch)).values(needs=needs), execution_options=plain)
    if job["deterministic"]:
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


def _of_job(session: Session, job_id: str) -> dict[str, Any]:
    """Return the values that all tasks have from the job that brings them."""
    columns = (Job.priority, Job.state, Job.device, Job.gpu_type, Job.recipe)
    row = session.execute(select(*columns).where(Job.id == job_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"job: got {job_id!r}, wanted one of jobs ls")
    if row.state not in ACTIVE_JOBS:
        raise InvalidInputError(f"job {job_id}: got state {row.state}, wanted one that has not ended")
    minutes = (row.recipe.get("resources") or {}).get("task_minutes")
    return {
        "priority": row.priority,
        "device": row.device,
        "gpu_type": row.gpu_type,
        "deterministic": bool(row.recipe.get("deterministic")),
        "deadline_seconds": None if minutes is None else 60.0 * minutes,
    }


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


def _add(session: Session, job_id: str, shared: Mapping[str, Any], nodes: Sequence[TaskNode]) -> None:
    # Only enqueueing adds tasks, under its own lock, and nothing removes them: what is absent now stays absent.
    ids = [node.id for node in nodes]
    present = set(run(session, _PRESENT, given=rows_json([{"id": each} for each in ids])).scalars())
    new = [node for node in nodes if node.id not in present]
    insert_rows(session, Task, [_task_values(node, shared) for node in new])
    insert_rows(session, TaskInput, [edge for node in new for edge in input_edges(node)])
    wanted = [{"job_id": job_id, "task_id": each, "cached": False} for each in ids]
    insert_rows(session, JobTask, wanted, or_ignore=True)


#: What a task asks for; the claim reads tasks that ask for the same as one group.
NEEDS = ("cpus", "gpus", "memory_bytes", "gpu_memory_bytes", "device", "gpu_type")
_DEFAULT_NEEDS: Mapping[str, Any] = {"gpu_memory_bytes": 0, "device": "auto", "gpu_type": None}


def needs_of(values: Mapping[str, Any]) -> str:
    """Name what a task asks for, by the values of its columns."""
    asked = {**_DEFAULT_NEEDS, **values, "cpus": float(values["cpus"]), "gpus": float(values["gpus"])}
    return "/".join(str(asked[name]) for name in NEEDS)


def _task_values(node: TaskNode, shared: Mapping[str, Any]) -> dict[str, Any]:
    values = _plain_values(node, shared)
    return values | {"needs": needs_of(values)}


def _plain_values(node: TaskNode, shared: Mapping[str, Any]) -> dict[str, Any]:
    resources = node.resources
    must = shared["device"] == "cuda" and resources.gpu_memory_bytes > 0
    return {
        **shared,
        "id": node.id,
        "kind": node.kind,
        "version": node.version,
        "params": dict(node.params),
        "inputs": inputs_json(node.inputs),
        "cpus": node.resources.cpus,
        "gpus": max(resources.gpus, 1.0) if must else resources.gpus,
        "gpu_memory_bytes": resources.gpu_memory_bytes,
        "memory_bytes": node.resources.memory_bytes,
        "work": node.work,
        "label": node.label,
        "state": TaskState.BLOCKED.value,
        "waiting": len(node.sources()),
        "not_before": 0.0,
        "attempt": 0,
        "faults_task": 0,
        "faults_infrastructure": 0,
    }
