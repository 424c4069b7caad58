"""What Postgres assumes of how many rows have a state: always the same share, whatever its statistics saw.

A million finished tasks and none that is queued, as statistics see a database at rest, are taken for what holds when
ten thousand come: "one row is queued". Plans that read all of that "one" then look as cheap as those that look a key
up, and every finish reads the whole queue: 36 tasks a second in place of 1,000. Without statistics of the column
Postgres assumes that one row of 200 has a state, so that keys are looked up. SQLite keeps no such statistics by itself.
"""

from __future__ import annotations

from sqlalchemy import DDL, MetaData, event

#: Tables whose `state` sorts a few rows that are worked on out of all that there are.
TABLES = ("tasks", "jobs", "searches")


def drop_statistics() -> list[str]:
    """Return the statements that let Postgres keep no statistics of states, and forget those that it has."""
    # A column's statistics go when its type is set, even to what it is, which rewrites nothing.
    return [
        f"ALTER TABLE {table} ALTER COLUMN state TYPE varchar(16), ALTER COLUMN state SET STATISTICS 0"
        for table in TABLES
    ]


def keep_statistics() -> list[str]:
    """Return the statements that undo `drop_statistics`; the next ANALYZE makes them."""
    return [f"ALTER TABLE {table} ALTER COLUMN state SET STATISTICS -1" for table in TABLES]


def add_to(metadata: MetaData) -> None:
    """Let `create_all` do so too."""
    for statement in drop_statistics():
        event.listen(metadata, "after_create", DDL(statement).execute_if(dialect="postgresql"))
