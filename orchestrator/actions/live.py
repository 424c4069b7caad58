"""What shows work that goes on: a live table on a terminal, a line now and then anywhere else; always on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from orchestrator.errors import DatabaseError
from orchestrator.text import printable

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds between two looks at the database: on a terminal, and elsewhere.
LIVE_SECONDS, PLAIN_SECONDS = 0.5, 1.0
#: Elsewhere a line is due after a hundredth of the tasks, or after so many seconds if anything changed.
LINE_SECONDS = 10.0
_RATE_WINDOW_SECONDS = 60.0
_JOIN_SECONDS = 5.0


class Moment(Protocol):
    """Some work at one moment, and how it is shown."""

    @property
    def total(self) -> int:
        """Tasks in all."""

    @property
    def done(self) -> int:
        """Tasks that need nothing more, the cached ones included."""

    @property
    def computed(self) -> int:
        """Tasks that were computed for this work."""

    @property
    def content(self) -> tuple[object, ...]:
        """What is worth another line if it changes."""

    @property
    def news(self) -> object:
        """What is worth another line at once if it changes."""

    def line(self) -> str:
        """Return it as one line of text."""

    def table(self, per_second: float) -> Table:
        """Return it as a table for a terminal; tasks per second, 0 while nothing is known."""


class Live:
    """Shows work from a thread of its own, while the block runs.

    Parameters
    ----------
    take
        Reads how the work stands now.
    stream
        Where to; stderr by default.
    """

    def __init__(self, take: Callable[[], Moment], stream: TextIO | None = None) -> None:
        self._take = take
        self._stream = stream if stream is not None else sys.stderr
        self._stop = threading.Event()
        show = self._show_live if self._stream.isatty() else self._show_lines
        self._thread = threading.Thread(target=show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # What it shows comes from the database and the store, which may be hung.
        self._thread.join(_JOIN_SECONDS)

    def _show_lines(self) -> None:
        pace = LinePace()
        stopped = False
        while not stopped:
            stopped = self._stop.wait(PLAIN_SECONDS)
            # A look that fails costs one line of progress; the scheduler says on the log what it waits for.
            with suppress(DatabaseError):
                moment = self._take()
                if pace.is_due(moment, time.monotonic(), last=stopped):
                    self._stream.write(printable(moment.line()) + "\n")
                    self._stream.flush()

    def _show_live(self) -> None:
        from rich.console import Console
        from rich.live import Live as Screen

        pace = Pace()
        with Screen(console=Console(file=self._stream), auto_refresh=False) as screen:
            stopped = False
            while not stopped:
                with suppress(DatabaseError):
                    moment = self._take()
                    pace.add(time.monotonic(), moment.computed)
                    screen.update(moment.table(pace.per_second()), refresh=True)
                stopped = self._stop.wait(LIVE_SECONDS)
            with suppress(DatabaseError):
                screen.update(self._take().table(pace.per_second()), refresh=True)


class LinePace:
    """Decides when another line is worth writing."""

    def __init__(self) -> None:
        self._shown: tuple[object, ...] | None = None
        self._news: object = None
        self._done = 0
        self._at = 0.0

    def is_due(self, moment: Moment, now: float, *, last: bool) -> bool:
        """Say whether to write a line now; True also notes that it was written.

        Parameters
        ----------
        now
            Seconds of any clock.
        last
            The block is over: whatever changed is worth a line.
        """
        content = (*moment.content, moment.news)
        if content == self._shown:
            return False
        step = max(1, moment.total // 100)
        due = (
            self._shown is None
            or moment.news != self._news
            or moment.done >= self._done + step
            or now >= self._at + LINE_SECONDS
        )
        if due or last:
            self._shown, self._news, self._done, self._at = content, moment.news, moment.done, now
        return due or last


class Pace:
    """Tasks per second over the last minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, computed: int) -> None:
        """Note how many tasks were computed by now."""
        self._seen.append((now, computed))
        while now - self._seen[0][0] > _RATE_WINDOW_SECONDS:
            self._seen.popleft()

    def per_second(self) -> float:
        """Return the rate; 0 while nothing is known."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return 0.0
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start)
