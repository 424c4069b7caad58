"""The log of events: written last in a transaction, and read so that one who follows it misses none.

On Postgres ids come from a sequence, so a transaction that commits late may hold smaller ids than one that has been
seen. No writer waits for that. A transaction that is about to draw ids first takes a shared advisory lock whose
*number* is the last id drawn so far: all of its own will be greater. A reader looks at the sequence (`seen`), then at
those locks, waits until none has a smaller number than `seen`, and reads up to `seen`:

* who drew an id up to `seen` held such a lock before the reader looked at the sequence, and holds it until he has
  committed; so once no lock is below `seen`, every id up to it is committed or never will be;
* who takes a lock later draws ids greater than `seen`, for which the reader comes back.

Writers hold the lock for an insert and a commit. One that is stopped in between makes readers wait `PATIENCE_SECONDS`
and then read up to its number; no writer ever waits. On SQLite writers take turns, so ids are in order of commit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from orchestrator.db.sql import dump, is_postgres, rows_json, send, statement

#: How long a reader waits for writers that have begun to write events and have not committed.
PATIENCE_SECONDS = 1.0
_PAUSE_SECONDS = 0.002

# The upper 16 bits of the numbers of these advisory locks; those of `session.py` are small.
_TAG = 0x514D

_COLUMNS = "event, job_id, task_id, attempt, at, data"
_WRITE = statement(
    f"""
    INSERT INTO events ({_COLUMNS})
    SELECT event, job_id, task_id, attempt, {{now}}, data FROM {{given}} ORDER BY n
    """,
    {"n": "integer", "event": "text", "job_id": "text", "task_id": "text", "attempt": "integer", "data": "text"},
    postgres=f"""
    WITH announced AS MATERIALIZED (
        SELECT pg_advisory_xact_lock_shared(
            (CAST({_TAG} AS bigint) << 48) | (last_value - CAST(NOT is_called AS integer))
        ) FROM events_id_seq
    )
    INSERT INTO events ({_COLUMNS})
    SELECT event, job_id, task_id, attempt, {{now}}, CAST(data AS json) FROM announced CROSS JOIN {{given}} ORDER BY n
    """,
)  # fmt: skip
_LAST = text("SELECT last_value FROM events_id_seq")
_LEAST_ANNOUNCED = text(
    f"""
    SELECT min(((CAST(classid AS bigint) & 65535) << 32) | CAST(objid AS bigint)) FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND CAST(classid AS bigint) >> 16 = {_TAG} AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
)


def record_event(
    session: Session,
    name: str,
    *,
    job: str | None = None,
    task: str | None = None,
    attempt: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Note an event; it is written when the session commits."""
    session.info["events"].append(
        {"event": name, "job_id": job, "task_id": task, "attempt": attempt, "data": dump(data) if data else "{}"}
    )


def write_events(session: Session) -> None:
    """Write the noted events; the commit must follow at once."""
    noted = session.info["events"]
    if noted:
        send(session, _WRITE, given=rows_json([each | {"n": number} for number, each in enumerate(noted)]))


def last_settled_event(session: Session) -> int | None:
    """Return the id up to which all events are there that ever will be, having waited for those being written.

    None: all ids are settled.
    """
    if not is_postgres(session):
        return None
    connection = session.connection()
    seen = int(connection.execute(_LAST).scalar_one())
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        announced = connection.execute(_LEAST_ANNOUNCED).scalar_one()
        if announced is None or announced >= seen:
            return seen
        if time.monotonic() > deadline:
            return int(announced)
        time.sleep(_PAUSE_SECONDS)
