"""Leases: a keeper renews one's own from a thread, however busy the scheduler is; a reaper takes others' back.

A database that was out, or hung, is no reason to lose a lease: one that ran out meanwhile is renewed if nobody has
taken it, and nobody takes any until their holders have had the time to renew.
"""

from __future__ import annotations

import logging
import threading
import time

from orchestrator.db.clock import database_time
from orchestrator.db.queries import reap_expired, renew_leases
from orchestrator.db.rows import Lease
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError

log = logging.getLogger(__name__)

#: Renewals per lease: it survives that many minus one that fail.
RENEWALS = 4
# How soon a renewal that failed is tried again, at most, in seconds.
_SOON_SECONDS = 1.0
# Leases that ran out are looked for this often, in seconds, and not by who waited for an answer for longer than that.
_REAP_SECONDS, _SLOW_SECONDS = 5.0, 2.0


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
        regular = self._lease_seconds / RENEWALS
        pause = regular
        while not self._ending.wait(pause):
            try:
                self.renew()
                pause = regular
            except DatabaseError as error:
                # The next renewal may succeed in time; if none does, the leases are lost, and found to be so.
                log.warning("leases not renewed: %s", error)
                pause = min(regular, _SOON_SECONDS)

    def renew(self) -> None:
        """Renew every lease once."""
        with self._lock:
            leases = list(self._leases.values())
        if not leases:
            return
        with self._database.session() as session:
            good = set(renew_leases(session, leases, self._lease_seconds, late=True))
        with self._lock:
            # One that was dropped meanwhile has ended well and is no loss.
            lost = [lease for lease in leases if lease not in good and lease.token + lease.task_id in self._leases]
            self._lost += lost
        self.drop(lost)

    def revive(self, leases: list[Lease]) -> set[Lease]:
        """Renew leases that turned out to have run out; return those that nobody has taken."""
        with self._database.session() as session:
            return set(renew_leases(session, leases, self._lease_seconds, late=True))


class Reaper:
    """Takes back what other orchestrators left behind, now and then."""

    def __init__(self, database: Database, lease_seconds: float) -> None:
        """Look in `database`, whose leases last `lease_seconds`."""
        self._database = database
        self._lease_seconds = lease_seconds
        self._next = 0.0

    def is_due(self) -> bool:
        """Say whether it is time to look."""
        return time.monotonic() >= self._next

    def postpone_after(self, seconds: float) -> None:
        """Let the holders of leases renew first, if the database was out for so long that one could not."""
        if seconds > self._lease_seconds / 2:
            self._next = time.monotonic() + self._lease_seconds

    def reap(self) -> int:
        """Take tasks back whose leases ran out, unless the database was so slow that their holders could not renew.

        Returns how many.
        """
        begun = time.monotonic()
        self._next = begun + min(_REAP_SECONDS, self._lease_seconds / 2)
        with self._database.session(read_only=True) as session:
            database_time(session)
        if time.monotonic() - begun > _SLOW_SECONDS:
            self.postpone_after(self._lease_seconds)
            return 0
        with self._database.session() as session:
            reaped = reap_expired(session)
        if reaped:
            log.warning("took back %d tasks whose leases ran out", len(reaped))
        return len(reaped)
