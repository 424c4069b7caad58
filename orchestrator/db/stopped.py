"""Cancelled attempts that have ended: whoever revives their tasks need not wait for their leases to run out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import and_, not_, or_, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import JobTask, Task, in_states
from orchestrator.db.rows import Lease
from orchestrator.db.session import lock_graph, notify_others
from orchestrator.db.statements import batches
from orchestrator.states import TaskState

_MAY_WAIT = (TaskState.BLOCKED, TaskState.QUEUED, TaskState.CANCELLED)


def held_by(session: Session, job: str, owners: Collection[str]) -> list[Lease]:
    """Return the leases that some orchestrators have on tasks of a job."""
    if not owners:
        return []
    wanted = select(JobTask.task_id).where(JobTask.job_id == job)
    running = (in_states(Task.state, [TaskState.RUNNING]), Task.lease_owner.in_(owners), Task.id.in_(wanted))
    rows = session.execute(select(Task.id, Task.attempt, Task.lease_token).where(*running))
    return [Lease(row.id, row.attempt, row.lease_token or "") for row in rows]


def note_stopped(session: Session, leases: Sequence[Lease]) -> None:
    """Let nobody wait any longer for these attempts, whose holder lost them as they were cancelled, and stopped them.

    That ends the wait that cancelling left (`job_ends.py`) in the task itself, if nobody has claimed it since, and in
    queued ones that ask for the same result. A wait after a fault stays.
    """
    if not leases:
        return
    lock_graph(session)
    # A task that has failed an attempt, and was not cancelled since, waits for that.
    faulty = and_(Task.error.is_not(None), Task.state != TaskState.CANCELLED.value)
    waiting = (in_states(Task.state, _MAY_WAIT), Task.not_before > epoch_seconds(), not_(faulty))
    for batch in batches(leases):
        mine = or_(*(and_(Task.id == lease.task_id, Task.attempt == lease.attempt) for lease in batch))
        found = session.execute(select(Task.id, Task.key, Task.not_before).where(mine, *waiting)).all()
        for row in found:
            twin = and_(in_states(Task.state, [TaskState.QUEUED]), Task.key == row.key)
            statement = update(Task).where(or_(Task.id == row.id, twin), Task.not_before == row.not_before)
            session.execute(statement.values(not_before=0.0), execution_options={"synchronize_session": False})
        if found:
            notify_others(session)
