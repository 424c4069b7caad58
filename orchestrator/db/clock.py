"""The database's clock: the only one that decides about leases, backoff and order."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement


class epoch_seconds(FunctionElement[float]):
    """Seconds since 1970 UTC as a double, at the start of the statement."""

    type = Float(53)
    inherit_cache = True
    name = "epoch_seconds"


@compiles(epoch_seconds, "sqlite")
def _sqlite(element: epoch_seconds, compiler: Any, **kwargs: Any) -> str:
    # julianday is good to about 40 µs; unixepoch('subsec') would need SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(epoch_seconds, "postgresql")
def _postgresql(element: epoch_seconds, compiler: Any, **kwargs: Any) -> str:
    # Not now(): that is the start of the transaction, which may have waited for a lock since.
    return "extract(epoch from statement_timestamp())::double precision"


def database_time(session: Session) -> float:
    """Return the database's time in seconds since 1970 UTC."""
    return session.execute(select(epoch_seconds())).scalar_one()
