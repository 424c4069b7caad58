"""Connections to Postgres that wait for no answer for ever; apart, as the driver takes time to import."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg import waiting

from orchestrator.db.limits import Patience, Wait

T = TypeVar("T")


class PatientConnection(psycopg.Connection[Any]):
    """A connection that waits for no answer for ever; one that gave up is closed."""

    patience = Patience()

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> Any:
        """Connect as the driver does, or until patience is over; what bounds it otherwise is `connect_timeout`."""
        try:
            return (yield from _in_time(super()._connect_gen(conninfo), Wait(cls.patience)))
        except _TooLateError:
            raise psycopg.OperationalError("no answer in time to the attempt to connect") from None

    def wait(self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Run the driver's own generator to its end, or until patience is; see `psycopg.Connection.wait`.

        Raises
        ------
        OperationalError
            If the server does not answer in time.
        """
        try:
            return waiting.wait(
                _in_time(gen, Wait(self.patience)), self.pgconn.socket, interval=interval, timeout=timeout
            )
        except (_TooLateError, KeyboardInterrupt) as error:
            # The driver would ask the server to cancel, and wait for its answer.
            self.pgconn.finish()
            if isinstance(error, _TooLateError):
                raise psycopg.OperationalError("no answer in time; the connection was closed") from None
            raise


class _TooLateError(Exception):
    """The wait is over."""


def _in_time(work: Generator[Any, Any, T], wait: Wait) -> Generator[Any, Any, T]:
    """Hand on what the driver waits for and what it gets, until the wait is over."""
    try:
        wanted = next(work)
        while True:
            ready = yield wanted
            # 0: nothing came; the driver looks up every `interval`.
            if not ready and wait.is_over():
                raise _TooLateError
            wanted = work.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
