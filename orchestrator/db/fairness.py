"""Fair share between owners: each new task gets a rank, and of equal priority the lowest rank is claimed first.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with all tasks counted alike: an owner's tasks follow each
other by one; the first of them begins where his last one was, or where the service is now, if that is further. So
owners with work take turns, whoever came first with however much, and nobody saves up turns while he has no work.
"""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from orchestrator.db.models import Job, Owner, Task, in_states
from orchestrator.db.statements import insert_into
from orchestrator.states import TaskState


def next_rank(session: Session, job_id: str) -> float:
    """Return the rank of the next task that a job's owner brings; call under `lock_enqueue`."""
    owner = select(Job.owner).where(Job.id == job_id).scalar_subquery()
    last = session.scalar(select(Owner.rank).where(Owner.name == owner))
    return max(_now(session), 0.0 if last is None else last)


def note_rank(session: Session, job_id: str, rank: float) -> None:
    """Note where a job's owner goes on; call under `lock_enqueue`."""
    owner = session.scalar(select(Job.owner).where(Job.id == job_id))
    statement = insert_into(session, Owner).values(name=owner, rank=rank)
    session.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"rank": rank}))


def _now(session: Session) -> float:
    """Return where the service is: at the lowest rank that runs, else that waits, else behind all that ever came."""
    for state in (TaskState.RUNNING, TaskState.QUEUED):
        lowest = session.scalar(select(func.min(Task.rank)).where(in_states(Task.state, [state])))
        if lowest is not None:
            return float(lowest)
    return float(session.scalar(select(func.max(Owner.rank))) or 0.0)
