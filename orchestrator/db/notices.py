"""Telling orchestrators that there is something to claim, so that they need not ask all the time.

On Postgres by NOTIFY, with the commit of what is news (`session.notify_others`). Such commits go one after the other,
so it is sent for jobs that come and tasks that are given back, and now and then for tasks that became ready and that
whoever made them so does not take himself. On SQLite by the file's own counter of commits. Neither is relied on:
orchestrators also ask.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, PoolProxiedConnection

from orchestrator.db.engine import converted_errors
from orchestrator.db.session import CHANNEL, Database
from orchestrator.db.sql import POSTGRES
from orchestrator.errors import DatabaseError

_LOOK_SECONDS = 0.005


class Listener:
    """Hears of commits that others may want to know of; for one thread."""

    def __init__(self, database: Database) -> None:
        """Listen on a connection of its own, made at the first wait and again after an error."""
        self._database = database
        self._postgres: Connection | None = None
        self._sqlite: PoolProxiedConnection | None = None
        self._version: Any = None

    def wait(self, seconds: float) -> bool:
        """Wait for news, at most so long; return whether there is any.

        Raises
        ------
        DatabaseError
            If the database does not answer.
        """
        with converted_errors(self._database.location):
            try:
                is_postgres = self._database.engine.dialect.name == POSTGRES
                return self._wait_postgres(seconds) if is_postgres else self._wait_sqlite(seconds)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Give the connection up."""
        if self._postgres is not None:
            # Not to the pool, where it would go on listening.
            self._postgres.invalidate()
            self._postgres.close()
        if self._sqlite is not None:
            self._sqlite.close()
        self._postgres = self._sqlite = None

    def _wait_postgres(self, seconds: float) -> bool:
        if self._postgres is None:
            self._postgres = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            self._postgres.exec_driver_sql(f"LISTEN {CHANNEL}")
        driver: Any = self._postgres.connection.driver_connection
        try:
            heard = list(driver.notifies(timeout=seconds, stop_after=1))
        except self._database.engine.dialect.loaded_dbapi.Error as error:
            raise DatabaseError(
                f"database {self._database.shown_url}: listening ended ({type(error).__name__})"
            ) from None
        return bool(heard)

    def _wait_sqlite(self, seconds: float) -> bool:
        if self._sqlite is None:
            self._sqlite = self._database.engine.raw_connection()
        deadline = time.monotonic() + seconds
        while True:
            version = self._sqlite.cursor().execute("PRAGMA data_version").fetchone()
            if version != self._version:
                first, self._version = self._version is None, version
                if not first:
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
