"""Says in the database that this orchestrator works on it, or what it waits for; from a thread of its own."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.db.orchestrators import (
    OrchestratorNote,
    OrchestratorState,
    forget_orchestrator,
    see_orchestrator,
)
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError
from orchestrator.processes import own_process
from orchestrator.scheduling.outages import Outages

log = logging.getLogger(__name__)

#: How often an orchestrator is heard of, in seconds, if nothing changes.
SEEN_SECONDS = 5.0


class Presence:
    """One orchestrator's row, kept up to date until `stop`."""

    def __init__(
        self, database: Database, owner: str, outages: Outages, cluster: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Note what `owner` does; `cluster` returns what it sees of its cluster, as JSON."""
        self._database, self._owner, self._outages, self._cluster = database, owner[:128], outages, cluster
        self._process = own_process()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """Begin to note it."""
        self._thread.start()

    def stop(self) -> None:
        """Note no more, and remove the row."""
        self._ending = True
        self._outages.changed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        first = True
        while not self._ending:
            try:
                self._note(first=first)
                first = False
            except DatabaseError as error:
                log.debug("presence not noted: %s", error)
            self._outages.changed.wait(SEEN_SECONDS)
            self._outages.changed.clear()
        try:
            with self._database.session() as session:
                forget_orchestrator(session, self._owner)
        except DatabaseError as error:
            # It will be shown as gone, and forgotten after a day.
            log.debug("presence not removed: %s", error)

    def _note(self, *, first: bool) -> None:
        reason = self._outages.reason()
        state = OrchestratorState.WORKING if reason is None else OrchestratorState.WAITING
        cluster = {**self._cluster(), "process": self._process}
        note = OrchestratorNote(self._owner, socket.gethostname(), os.getpid(), state, reason, cluster)
        with self._database.session() as session:
            see_orchestrator(session, note, first=first)
