"""What can be claimed, best first.

Queued tasks of equal `needs` are a group, and of each group the first tasks are read: the claim costs the same with ten
or with fifty thousand tasks in front that ask for the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row
from sqlalchemy.orm import Session

from orchestrator.db.rows import Candidate, Wishes
from orchestrator.db.sql import Statement, is_postgres, run, statement
from orchestrator.graph import Resources

_NEEDS = "needs, alone, gpus, gpu_type"
_COLUMNS = (
    "seq, rank, id, key, kind, version, priority, cpus, gpus, memory_bytes, gpu_memory_bytes, "
    "device, gpu_type, alone, batch_divisor, deterministic"
)
# What Postgres' index of groups holds, in its words; the rest follows from it.
_QUEUED = "state = 'queued' AND waiting = 0"
# Each group's first task stands for what the group asks for; the next group begins behind it in the index.
_GROUPS = f"""
    WITH RECURSIVE groups AS (
        SELECT * FROM (
            SELECT {_NEEDS} FROM tasks WHERE {_QUEUED} ORDER BY needs, alone LIMIT 1
        ) AS first
        UNION ALL
        %s
    )
"""
_GROUPS_POSTGRES = (
    _GROUPS
    % f"""
    SELECT next.* FROM groups CROSS JOIN LATERAL (
        SELECT {_NEEDS} FROM tasks WHERE {_QUEUED} AND (needs, alone) > (groups.needs, groups.alone)
        ORDER BY needs, alone LIMIT 1
    ) AS next
"""
)
# SQLite has no LATERAL, so it finds the next group's first row by number; and comparing two columns at once, it would
# read the whole group.
_GROUPS_SQLITE = (
    _GROUPS
    % f"""
    SELECT {", ".join(f"tasks.{name}" for name in _NEEDS.split(", "))}
    FROM groups JOIN tasks ON tasks.seq = coalesce(
        (SELECT seq FROM tasks AS following WHERE state = 'queued' AND needs = groups.needs AND alone > groups.alone
         ORDER BY alone LIMIT 1),
        (SELECT seq FROM tasks AS following WHERE state = 'queued' AND needs > groups.needs
         ORDER BY needs, alone LIMIT 1)
    )
"""
)
# Groups that must have GPUs which are not there are passed over whole.
_FITS = """
    gpus <= :gpus
    AND (gpus = 0 OR gpu_type IS NULL OR CAST(:gpu_types AS text) IS NULL
         OR CAST(:gpu_types AS text) LIKE '%|' || lower(gpu_type) || '|%')
"""
#: No other task computes the same; looked up a key at a time, as joined with what runs, dead rows of that are read too.
KEY_IS_FREE = "(SELECT 1 FROM tasks AS other WHERE other.key = tasks.key AND other.state = 'running' LIMIT 1) IS NULL"
_READY = f"{_QUEUED} AND not_before <= {{now}} AND {KEY_IS_FREE}"
_HEAD = f"""
    SELECT {_COLUMNS} FROM tasks WHERE needs = %s AND alone = %s AND {_READY}
    ORDER BY priority DESC, rank, seq LIMIT :limit
"""
_READ_GROUPS = statement(f"{_GROUPS_SQLITE} SELECT needs, alone FROM groups WHERE {_FITS}")
_READ_HEAD = statement(_HEAD % (":needs", ":alone"))
_READ = statement(
    "SELECT 1",
    postgres=f"""
    {_GROUPS_POSTGRES}
    SELECT head.* FROM (SELECT needs, alone FROM groups WHERE {_FITS}) AS fitting
    CROSS JOIN LATERAL ({_HEAD % ("fitting.needs", "fitting.alone")} FOR NO KEY UPDATE SKIP LOCKED) AS head
    """,
)

_ANY_GPUS = 1e300


def read_candidates(
    session: Session, limit: int, gpus: float = _ANY_GPUS, gpu_types: Sequence[str] | None = None
) -> list[Candidate]:
    """Return what can be claimed, best first: at most `limit` of each group, locked.

    Tasks that must have more than `gpus`, or a type of GPU that is not among `gpu_types` (in lower case), are passed
    over; None: no matter.
    """
    rows = candidate_rows(session, limit, gpus, gpu_types)
    rows.sort(key=lambda row: (-row.priority, row.rank, row.seq))
    candidates: dict[str, Candidate] = {}
    for row in rows:
        if row.key not in candidates:
            candidates[row.key] = Candidate(
                id=row.id,
                key=row.key,
                kind=row.kind,
                resources=Resources(row.cpus, row.gpus, row.memory_bytes, row.gpu_memory_bytes),
                wishes=wishes_of(row),
                version=row.version,
            )
    return list(candidates.values())


def wishes_of(row: Row[Any]) -> Wishes:
    """Read the wishes of a task's row."""
    return Wishes(row.device, row.gpu_type, bool(row.alone), row.batch_divisor, bool(row.deterministic))


def candidate_rows(
    session: Session, limit: int, gpus: float = _ANY_GPUS, gpu_types: Sequence[str] | None = None
) -> list[Row[Any]]:
    """Return the rows of candidates, in no order."""
    fit = {"gpus": gpus, "gpu_types": None if gpu_types is None else f"|{'|'.join(gpu_types)}|"}
    heads = claim_statement(session)
    if is_postgres(session):
        return run(session, heads, **fit, limit=limit)
    groups = run(session, _READ_GROUPS, **fit)
    return [row for group in groups for row in run(session, heads, **group._asdict(), limit=limit)]


def claim_statement(session: Session) -> Statement:
    """Return the statement that reads the heads of all groups (Postgres), or of one group (SQLite)."""
    return _READ if is_postgres(session) else _READ_HEAD
