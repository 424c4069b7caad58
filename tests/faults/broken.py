"""Pieces of a broken queue, to see that the harness finds it out."""

from __future__ import annotations

from sqlalchemy import text

from orchestrator.db.sql import Statement


def whatever_the_time(statement: Statement) -> Statement:
    """Return a statement that takes leases which have run out for good ones."""
    return _with(statement, "tasks.lease_until >", "0 <")


def though_recorded(statement: Statement) -> Statement:
    """Return a statement that queues tasks whose results are recorded."""
    return _with(statement, "EXISTS (SELECT 1 FROM results", "0 = (SELECT 1 FROM results")


def _with(statement: Statement, old: str, new: str) -> Statement:
    sqlite, postgresql = (text(each.text.replace(old, new)) for each in (statement.sqlite, statement.postgresql))
    assert (sqlite.text, postgresql.text) != (statement.sqlite.text, statement.postgresql.text)
    return Statement(sqlite, postgresql)
