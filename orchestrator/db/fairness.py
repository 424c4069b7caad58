"""Fair share between owners: each new task gets a rank, and of equal priority the lowest rank is claimed first.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with all tasks counted alike: an owner's tasks follow each
other by one; the first of them begins where his last one was, or where the service is now, if that is further. So
owners with work take turns, whoever came first with however much, and nobody saves up turns while he has no work.
"""

from __future__ import annotations

from sqlalchemy.orm import Session

from orchestrator.db.models import sql_list
from orchestrator.db.sql import run, send, statement
from orchestrator.states import TaskState

# The service is at the lowest rank that runs, else that waits, else behind all that ever came. Each state by itself:
# its partial index is read.
_LOWEST = "SELECT min(tasks.rank) FROM tasks WHERE tasks.state = {}"
_NEXT = statement(
    f"""
    SELECT coalesce(({_LOWEST.format(sql_list([TaskState.RUNNING]))}), ({_LOWEST.format(sql_list([TaskState.QUEUED]))}),
                    (SELECT max(rank) FROM owners), 0.0) AS now,
           (SELECT owners.rank FROM owners JOIN jobs ON jobs.owner = owners.name WHERE jobs.id = :job) AS last
    """
)
_NOTE = statement(
    """
    INSERT INTO owners (name, rank) SELECT owner, :rank FROM jobs WHERE id = :job
    ON CONFLICT (name) DO UPDATE SET rank = excluded.rank
    """
)


def next_rank(session: Session, job_id: str) -> float:
    """Return the rank of the next task that a job's owner brings; call under `lock_enqueue`."""
    (row,) = run(session, _NEXT, job=job_id)
    return max(float(row.now), 0.0 if row.last is None else row.last)


def note_rank(session: Session, job_id: str, rank: float) -> None:
    """Note where a job's owner goes on; call under `lock_enqueue`."""
    send(session, _NOTE, job=job_id, rank=rank)
