"""Keeps the leases of tasks in flight alive, from a thread of its own, however busy the scheduler is."""

from __future__ import annotations

import logging
import threading

from orchestrator.db.queries import renew_leases
from orchestrator.db.rows import Lease
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError

log = logging.getLogger(__name__)

#: Renewals per lease: it survives that many minus one that fail.
RENEWALS = 4


class LeaseKeeper:
    """Renews leases every quarter of their time, and collects those that were lost."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        """Keep leases of `lease_seconds` in `database`; `start` begins."""
        self._database = database
        self._lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._lost: list[Lease] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def add(self, leases: list[Lease]) -> None:
        """Keep these too."""
        with self._lock:
            self._leases.update((lease.token + lease.task_id, lease) for lease in leases)

    def drop(self, leases: list[Lease]) -> None:
        """Keep these no longer."""
        with self._lock:
            for lease in leases:
                self._leases.pop(lease.token + lease.task_id, None)

    def take_lost(self) -> list[Lease]:
        """Return the leases that turned out to be lost since the last time: stop their tasks."""
        with self._lock:
            lost, self._lost = self._lost, []
        return lost

    def stop(self) -> None:
        """End the thread."""
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(self._lease_seconds / RENEWALS):
            try:
                self.renew()
            except DatabaseError as error:
                # The next renewal may succeed in time; if none does, the leases are lost, and found to be so.
                log.warning("leases not renewed: %s", error)

    def renew(self) -> None:
        """Renew every lease once."""
        with self._lock:
            leases = list(self._leases.values())
        if not leases:
            return
        with self._database.session() as session:
            good = set(renew_leases(session, leases, self._lease_seconds))
        with self._lock:
            # One that was dropped meanwhile has ended well and is no loss.
            lost = [lease for lease in leases if lease not in good and lease.token + lease.task_id in self._leases]
            self._lost += lost
        self.drop(lost)
