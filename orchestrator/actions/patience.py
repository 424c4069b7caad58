"""What a command that waits does while the database is out: it waits for that, too, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import OUTAGES, DatabaseUnavailableError

T = TypeVar("T")

#: How long a command waits for a database that was there, in seconds, and how long between two tries.
PATIENCE_SECONDS, PAUSE_SECONDS = 120.0, 1.0


def patiently(
    work: Callable[[], T], notify: Callable[[str], None] = lambda _: None, deadline: float | None = None
) -> T:
    """Do something that needs the database; if it is out, again until it is back.

    Parameters
    ----------
    work
        What to do; not half done when it raises.
    notify
        Told once that the database is waited for.
    deadline
        By `time.monotonic`: the last moment to try, if that comes before the end of patience.

    Raises
    ------
    DatabaseUnavailableError
        If it stays out. It was there when the command began, so this is no bad input: the exit code is 1.
    """
    ends = time.monotonic() + PATIENCE_SECONDS
    if deadline is not None:
        ends = min(ends, deadline)
    told = False
    while True:
        try:
            return work()
        except OUTAGES as error:
            if time.monotonic() + PAUSE_SECONDS > ends:
                raise DatabaseUnavailableError(str(error)) from error
            if not told:
                notify(f"waiting for the database: {error}")
                told = True
        time.sleep(PAUSE_SECONDS)
