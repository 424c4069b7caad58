"""Pieces of a broken queue, to see that the harness finds it out."""

from __future__ import annotations

from sqlalchemy import text

from orchestrator.db.sql import Statement


def whatever_the_time(statement: Statement) -> Statement:
    """Return a statement that takes leases which have run out for good ones."""
    sqlite, postgresql = (
        text(each.text.replace("tasks.lease_until >", "0 <")) for each in (statement.sqlite, statement.postgresql)
    )
    assert (sqlite.text, postgresql.text) != (statement.sqlite.text, statement.postgresql.text)
    return Statement(sqlite, postgresql)
