"""How long a database may take: limits that the server keeps, and one that this side keeps if the server hangs.

A server that was stopped keeps its connections open, and its kernel goes on answering for it, so neither its own limits
nor TCP's show that nobody works there any more. So every wait for an answer ends after a while. A database that
does not answer in time has lost its connection: what became of the statement is not known, as when the line is cut.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Any

#: After how many idle seconds Postgres ends a transaction whose owner was stopped or cut off while it held locks.
IDLE_IN_TRANSACTION_SECONDS = 30
#: How long a statement may wait for locks; longer than a stopped owner can keep them.
LOCK_SECONDS = 45
#: How long a statement may take, its locks included.
STATEMENT_SECONDS = 60
#: How long an answer may take on this side; longer than the server takes to give up by itself.
ANSWER_SECONDS = 75.0
#: The same once this process has been told to end: for all answers together, and for each one that begins later.
LAST_ANSWER_SECONDS, LATER_ANSWER_SECONDS = 3.0, 0.5
#: How long a server may take to accept a connection; the least that its library knows is 2.
CONNECT_SECONDS = 5
#: How long sent bytes may go without an acknowledgement of the server's machine.
UNACKNOWLEDGED_SECONDS = 20

#: What a connection is told when it is made.
SERVER_LIMITS = {
    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "statement_timeout": f"{STATEMENT_SECONDS}s",
}
#: A machine that is gone is noticed after half a minute.
SOCKET_LIMITS: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": UNACKNOWLEDGED_SECONDS * 1000,
}


@dataclass(slots=True)
class Patience:
    """How long to wait for answers: `answer_seconds`, and not much longer once `stop` is set."""

    answer_seconds: float = ANSWER_SECONDS
    stop: threading.Event | None = None
    _hurried_at: float | None = None

    @property
    def hurried(self) -> bool:
        """Whether this process has been told to end."""
        return self.stop is not None and self.stop.is_set()

    @property
    def connect_seconds(self) -> int:
        """How long to wait for a connection."""
        return int(LAST_ANSWER_SECONDS) if self.hurried else CONNECT_SECONDS

    def last_moment(self, begun: float, now: float) -> float:
        """Return when a wait that began then must be over, once this process has been told to end."""
        if self._hurried_at is None:
            self._hurried_at = now
        return max(self._hurried_at + LAST_ANSWER_SECONDS, begun + LATER_ANSWER_SECONDS)


class Wait:
    """One wait for an answer."""

    def __init__(self, patience: Patience, most: float = math.inf) -> None:
        """Begin to wait, for `most` seconds at most."""
        self._patience = patience
        self._begun = time.monotonic()
        self._ends = self._begun + min(patience.answer_seconds, most)

    def is_over(self) -> bool:
        """Say whether it has been too long; asked a few times a second, so that an order to end is noticed."""
        now = time.monotonic()
        if self._patience.hurried:
            self._ends = min(self._ends, self._patience.last_moment(self._begun, now))
        return now > self._ends
