"""Connections to Postgres that wait for no answer for ever, and for few answers at all; apart, as the driver takes time
to import.
"""

from __future__ import annotations

import select
import time
from collections.abc import Generator
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import psycopg
from psycopg import Pipeline, waiting

from orchestrator.db.limits import Patience, Wait

T = TypeVar("T")

# A connection that was silent for longer is asked whether it is still there before it is used.
_FRESH_SECONDS = 1.0


class PatientConnection(psycopg.Connection[Any]):
    """A connection that waits for no answer for ever; one that gave up is closed."""

    patience = Patience()
    _heard_at = 0.0
    _ahead: ExitStack | None = None
    _begun = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Wrap the driver's connection."""
        super().__init__(*arguments, **options)
        self._spare: list[psycopg.Cursor[Any]] = []

    def is_surely_there(self) -> bool:
        """Say whether the server answered a moment ago and has not ended the connection since, so it need not be asked.

        A server that ends a connection says so, which can be seen without a round trip.
        """
        if self.closed or time.monotonic() - self._heard_at > _FRESH_SECONDS:
            return False
        said = select.poll()
        said.register(self.pgconn.socket, select.POLLIN)
        return not said.poll(0)

    def send_ahead(self) -> None:
        """Send a transaction's statements at once, and wait only for the answers that are fetched.

        Statements of `ahead_cursor` alone; `cursor`, as others call it, waits for all answers and ends this, and so
        does the end of the transaction. An error is raised by whatever is waited for next.
        """
        self._ahead, self._begun = ExitStack(), False
        self._pipeline = _Batch(self)
        self._ahead.enter_context(self.pipeline())

    @property
    def is_ahead(self) -> bool:
        """Whether statements are sent ahead."""
        return self._ahead is not None

    def ahead_cursor(self) -> psycopg.Cursor[Any]:
        """Return a cursor for a statement that is sent ahead."""
        return self._spare.pop() if self._spare else super().cursor()

    def give_back(self, cursor: psycopg.Cursor[Any]) -> None:
        """Use a cursor of `ahead_cursor` again, whose rows have been fetched: making one takes as long as fetching."""
        self._spare.append(cursor)

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        """Return a cursor whose statements are waited for."""
        self._catch_up()
        return super().cursor(*arguments, **options)

    def commit(self) -> None:
        """Commit; what was sent ahead goes with it.

        Raises
        ------
        OperationalError
            If the server answered with anything but success.
        """
        if self._ahead is None:
            super().commit()
            return
        try:
            cursor = self.ahead_cursor()
            cursor.execute("COMMIT", prepare=False)
            self._catch_up()
            if cursor.statusmessage != "COMMIT":
                raise psycopg.OperationalError(f"got {cursor.statusmessage!r} from the server, wanted a commit")
        except BaseException:
            # A commit that fails has ended the transaction, as callers know; one that was not reached has not.
            with suppress(psycopg.Error):
                self.rollback()
            raise

    def rollback(self) -> None:
        """Roll back; errors of what was sent ahead no longer matter."""
        with suppress(psycopg.Error):
            self._catch_up()
        super().rollback()

    def _catch_up(self) -> None:
        """Wait for all answers, and send nothing ahead any more."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def _start_query(self) -> Any:
        """Begin a transaction before its first statement; one that is sent ahead, without waiting for the answer."""
        if self._ahead is None:
            yield from super()._start_query()
        elif not self._begun:
            self._begun = True
            yield from self._exec_command(self._get_tx_start_command())

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> Any:
        """Connect as the driver does, or until patience is over; what bounds it otherwise is `connect_timeout`."""
        try:
            work = super()._connect_gen(conninfo)
            return (yield from _in_time(work, next(work), Wait(cls.patience)))
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
            wanted = next(gen)
        except StopIteration as end:
            # Sent ahead: there is nothing to wait for.
            done: T = end.value
            return done
        try:
            found = waiting.wait(
                _in_time(gen, wanted, Wait(self.patience)), self.pgconn.socket, interval=interval, timeout=timeout
            )
        except BaseException as error:
            if not isinstance(error, psycopg.Error | UnicodeError):
                # Ended from outside, as by Ctrl-C. The driver would ask the server to cancel, and wait for its answer.
                self.pgconn.finish()
            with suppress(psycopg.Error):
                # Even now a pipeline asks for its answers. Whoever collected it later could only print the error.
                gen.close()
            if isinstance(error, _TooLateError):
                raise psycopg.OperationalError("no answer in time; the connection was closed") from None
            raise
        self._heard_at = time.monotonic()
        return found


class _TooLateError(Exception):
    """The wait is over."""


class _Batch(Pipeline):
    """Statements that go to the server together, with the request for the first answer that is waited for."""

    def _communicate_gen(self) -> Any:
        """Hand what is queued to libpq; the driver would send each by itself, and look for answers in between."""
        while self.command_queue:
            self.command_queue.popleft()()
        yield from ()


def _in_time(work: Generator[Any, Any, T], wanted: Any, wait: Wait) -> Generator[Any, Any, T]:
    """Hand on what the driver waits for, first `wanted`, and what it gets, until the wait is over."""
    try:
        while True:
            ready = yield wanted
            # 0: nothing came; the driver looks up every `interval`.
            if not ready and wait.is_over():
                raise _TooLateError
            wanted = work.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
