"""Waiting out a database that does not answer, by whoever only looks at it.

An address that does not answer at the start is refused at once, as it may be a wrong one. Once it has answered, an
outage is waited out; one that outlasts that is nobody's bad input.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import DatabaseError, OutageError

T = TypeVar("T")

#: How long a database may be away while someone looks at a job, in seconds.
PATIENCE_SECONDS = 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0


def look_patiently(look: Callable[[], T], *, until: float | None = None) -> T | None:
    """Look at the database, again and again while it does not answer; None if the time is over first.

    Parameters
    ----------
    look
        Reads, and may raise DatabaseError.
    until
        When to give up, by `time.monotonic`.

    Raises
    ------
    OutageError
        If the database did not answer for `PATIENCE_SECONDS`.
    """
    given_up, pause = time.monotonic() + PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return look()
        except DatabaseError as error:
            now = time.monotonic()
            if until is not None and now >= until:
                return None
            if now + pause > given_up:
                raise as_outage(error) from error
            left = pause if until is None else until - now
        time.sleep(min(pause, left))
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


def as_outage(error: DatabaseError) -> OutageError:
    """Return the error of a database that had answered before: exit code 1, where a wrong address has 2."""
    return OutageError(f"{error}; it had answered before, wanted it back sooner")
