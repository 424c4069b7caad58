"""Wakes a scheduler when there is news in the database; without it, the scheduler asks every so often."""

from __future__ import annotations

import logging
import threading

from orchestrator.db.notices import Listener
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError

log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.25
_PAUSE_SECONDS = 1.0


class Wakeup:
    """Listens from a thread of its own."""

    def __init__(self, database: Database) -> None:
        """Listen to `database`; `start` begins."""
        self._listener = Listener(database)
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="wakeup", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait for news, at most so long; return whether there is any, and forget it."""
        heard = self._news.wait(seconds)
        self._news.clear()
        return heard

    def stop(self) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                if self._listener.wait(_WAIT_SECONDS):
                    self._news.set()
            except DatabaseError as error:
                log.debug("not listening: %s", error)
                self._ending.wait(_PAUSE_SECONDS)
        self._listener.close()
