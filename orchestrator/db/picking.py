"""Claiming by placement: what can be claimed is shown to a picker, which says what starts now and where.

A job may want one type of device for all its tasks (`deterministic`). The first of its tasks that gains by a GPU, and
is picked, binds the job to the type that it got; the others follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sqlalchemy import ColumnElement, case, or_, select, update
from sqlalchemy.orm import Session

from orchestrator.db.candidates import read_candidates
from orchestrator.db.models import Job, JobTask, Task, in_states
from orchestrator.db.rows import Candidate
from orchestrator.states import ACTIVE_JOBS, TaskState
from quant_spec.kinds import KINDS

#: A batch is divided by no more than this.
_MOST_DIVISOR = 1024


@dataclass(frozen=True, slots=True)
class Picked:
    """Where a task starts: the node's name, and "cpu" or the type of GPU; `pins` if its job is bound to that type."""

    where: str
    device: str
    gpu_type: str | None = None
    pins: bool = False


class Picker(Protocol):
    """Decides which tasks start now."""

    def gpus(self) -> tuple[float, Sequence[str]]:
        """Return the most GPUs that a task may ask for, and their types in lower case."""
        ...

    def pick(self, candidates: Iterable[Candidate]) -> Mapping[str, Picked]:
        """Return the tasks that start now, best first, and where."""
        ...

    def drop(self, task: str) -> None:
        """Take note that a task that was picked does not start after all."""
        ...


#: "cpu" or "cuda", and the type of GPU.
Pin = tuple[str, str | None]


def pick(session: Session, picker: Picker, limit: int) -> dict[str, str]:
    """Return the tasks to claim, best first, and the name of the node of each.

    The first tasks of each group that asks for the same are looked at, whatever they ask for: so room can be kept for
    what stands first in the queue, and what fits beside it is found however far back it is.
    """
    gpus, gpu_types = picker.gpus()
    candidates = read_candidates(session, limit, gpus, gpu_types)
    pins = _pins(session, [each.id for each in candidates if each.wishes.deterministic])
    found = {}
    for task, picked in picker.pick([_pinned(each, pins) for each in candidates]).items():
        if picked.pins and not _pin(session, task, picked):
            picker.drop(task)
            continue
        found[task] = picked.where
    return found


def _pinned(candidate: Candidate, pins: Mapping[str, Pin]) -> Candidate:
    """Let a task of a job that is bound to a type of device ask for that."""
    if not candidate.is_unpinned or candidate.id not in pins:
        return candidate
    device, gpu_type = pins[candidate.id]
    return replace(candidate, wishes=replace(candidate.wishes, device=device, gpu_type=gpu_type))


def _pins(session: Session, tasks: Sequence[str]) -> dict[str, Pin]:
    """Return what the jobs of tasks are bound to; of several, what the first is."""
    if not tasks:
        return {}
    statement = (
        select(JobTask.task_id, Job.device, Job.gpu_type)
        .join(Job, Job.id == JobTask.job_id)
        .where(JobTask.task_id.in_(tasks), in_states(Job.state, ACTIVE_JOBS), _is_pinned())
        .order_by(Job.created_at.desc())
    )
    return {row.task_id: (row.device, row.gpu_type) for row in session.execute(statement)}


def _is_pinned() -> ColumnElement[bool]:
    return or_(Job.device == "cpu", Job.gpu_type.is_not(None))


def _pin(session: Session, task: str, picked: Picked) -> bool:
    """Bind the jobs of a task to a type of device; False if another transaction is doing that, or just did."""
    jobs = select(Job.id, Job.recipe).join(JobTask, JobTask.job_id == Job.id)
    jobs = jobs.where(JobTask.task_id == task, in_states(Job.state, ACTIVE_JOBS), ~_is_pinned())
    wanted = {row.id for row in session.execute(jobs) if row.recipe.get("deterministic")}
    free = {row.id for row in session.execute(jobs.with_for_update(of=Job, skip_locked=True))}
    if not wanted or not wanted <= free:
        return False
    values = {"device": picked.device, "gpu_type": picked.gpu_type}
    statement = update(Job).where(Job.id.in_(wanted)).values(**values)
    session.execute(statement, execution_options={"synchronize_session": False})
    return True


def wanted_gpus(session: Session) -> list[str]:
    """Return the types of GPU that queued tasks cannot do without, "any" where none is named."""
    statement = select(Task.gpu_type).where(in_states(Task.state, [TaskState.QUEUED]), Task.gpus > 0).distinct()
    return sorted(gpu_type or "any" for gpu_type in session.scalars(statement.limit(10)))


def after_out_of_memory() -> dict[str, Any]:
    """Return what changes of a task whose memory ran out: it is alone, with half the batch where that is free."""
    free = [name for name, kind in KINDS.items() if kind.batch_free is not None]
    may_halve = Task.kind.in_(free) & ~Task.deterministic & (Task.batch_divisor < _MOST_DIVISOR)
    return {"alone": True, "batch_divisor": case((may_halve, Task.batch_divisor * 2), else_=Task.batch_divisor)}
