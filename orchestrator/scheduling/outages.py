"""Outages are waited for: a circuit breaker for each thing that every task needs.

While the store, the database or the cluster is out, nothing is claimed; what failed for it is given back at no cost,
what runs goes on, and leases are kept. The thing is tried again after growing pauses, for ever, and work goes on by
itself.

A breaker is *closed* while all is well. A fault *opens* it for a pause. Then the thing is probed; while the probe
fails, pauses grow. A probe that passes makes it *half-open*: one task at a time is claimed, as a trial. A task that
ends well closes it, and so does a trial time without a fault, as a task may take hours; a fault opens it for longer
than before.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from workers.errors import Dependency, describe
from workers.storage.store import Store, open_store

log = logging.getLogger(__name__)

_STARVED = "it has no CPU or memory for a task"
#: Note that a probe writes and removes.
PROBE = "probe"
# So long no task in flight has ended well before the store is asked, how often it is then asked before it counts as
# out, and how long that may take altogether: a folder's file system may hang for ever. In seconds.
_QUIET_SECONDS, _ASKED, _LATE_SECONDS = 10.0, 2, 25.0


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds before the first new try after a fault; each further pause is twice as long, up to the longest."""

    first: float = 0.5
    longest: float = 30.0

    def after(self, failures: int) -> float:
        """Return the pause after so many failures in a row, at least one."""
        return min(self.first * 2.0 ** min(failures - 1, 32), self.longest)


class BreakerState(StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """The state of one dependency; times are seconds of any clock that only goes forward."""

    def __init__(self, pauses: Pauses) -> None:
        """Begin closed."""
        self._pauses = pauses
        self._failures = 0
        self._until = 0.0
        self.state = BreakerState.CLOSED
        self.reason: str | None = None

    def trip(self, reason: str, now: float) -> bool:
        """Open for a fault; return whether that is news. Faults that come while it is open are of the same outage."""
        if self.state is BreakerState.OPEN:
            return False
        self.state, self.reason = BreakerState.OPEN, reason
        self._fail(now)
        return True

    def probed(self, reason: str | None, now: float) -> None:
        """Take what a probe found: None if the dependency serves again."""
        if reason is not None:
            self.reason = reason
            self._fail(now)
        elif self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN
            self._until = now + self._pauses.after(self._failures)

    def succeed(self) -> bool:
        """Close, as the dependency has served; return whether that is news."""
        news = self.state is not BreakerState.CLOSED
        self.state, self.reason, self._failures = BreakerState.CLOSED, None, 0
        return news

    def _fail(self, now: float) -> None:
        self._failures += 1
        self._until = now + self._pauses.after(self._failures)

    def is_due(self, now: float) -> bool:
        """Say whether it is open and its pause is over."""
        return self.state is BreakerState.OPEN and now >= self._until

    def seconds_left(self, now: float) -> float:
        """Return what is left of its pause."""
        return max(0.0, self._until - now)

    def limit(self, now: float) -> int | None:
        """Return how many tasks may be in flight because of it: 0, 1 or, None, any number."""
        if self.state is BreakerState.HALF_OPEN and now >= self._until:
            # Closed on trial: a fault soon after still counts as one more.
            self.state, self.reason = BreakerState.CLOSED, None
        return {BreakerState.CLOSED: None, BreakerState.OPEN: 0, BreakerState.HALF_OPEN: 1}[self.state]


class Outages:
    """The breakers of one orchestrator; safe to share between threads."""

    def __init__(self, pauses: Pauses, probe_store: Callable[[], None]) -> None:
        """Begin with all well; `probe_store` raises if the store does not serve, and may take its time."""
        self._probe_store = probe_store
        self._lock = threading.Lock()
        self._breakers = {each: Breaker(pauses) for each in Dependency}
        self._probing: threading.Thread | None = None
        self._asked_at = self._served_at = time.monotonic()
        self._starved = False
        #: Set whenever `reason` may have changed.
        self.changed = threading.Event()

    def fault(self, dependency: Dependency, reason: str) -> None:
        """Note that something failed because a dependency is out."""
        with self._lock:
            news = self._breakers[dependency].trip(reason, time.monotonic())
        if news:
            log.warning("waiting for the %s: %s", dependency, reason)
        self.changed.set()

    def success(self, *dependencies: Dependency) -> None:
        """Note that these served well."""
        for each in dependencies:
            with self._lock:
                news = self._breakers[each].succeed()
                if each is Dependency.STORE:
                    self._served_at = time.monotonic()
            if news:
                log.warning("the %s serves again", each)
                self.changed.set()

    def starved(self, *, yes: bool) -> None:
        """Note whether the cluster is there and has nothing to run a task with."""
        if yes == self._starved:
            return
        self._starved = yes
        self.changed.set()
        if yes:
            log.warning("waiting for the cluster: %s", _STARVED)

    def reason(self) -> str | None:
        """Return what is waited for and why, in one line; None if nothing is."""
        with self._lock:
            out = [f"{name}: {each.reason}" for name, each in self._breakers.items() if each.reason is not None]
        if not out and self._starved:
            out = [f"cluster: {_STARVED}"]
        return "; ".join(out) or None

    def room(self, in_flight: int, most: int) -> int:
        """Return how many tasks may be claimed now, `most` if all is well; probes what is due."""
        now = time.monotonic()
        with self._lock:
            late = self._is_late(now)
            for name, breaker in self._breakers.items():
                if breaker.is_due(now):
                    self._probe(name, breaker, now)
            if in_flight and now > max(self._served_at, self._asked_at) + _QUIET_SECONDS:
                self._ask(_ASKED)
            before = [each.state for each in self._breakers.values()]
            limits = [limit for each in self._breakers.values() if (limit := each.limit(now)) is not None]
            changed = before != [each.state for each in self._breakers.values()]
        if changed:
            self.changed.set()
        if late:
            self.fault(Dependency.STORE, f"got no answer within {_LATE_SECONDS:.0f} s, wanted one")
        return max(0, min([most, *(limit - in_flight for limit in limits)]))

    def pause(self, dependency: Dependency) -> float:
        """Return how long to wait before a dependency is tried again, in seconds."""
        with self._lock:
            return self._breakers[dependency].seconds_left(time.monotonic())

    def failed_again(self, dependency: Dependency, reason: str) -> None:
        """Note that another try of what is out has failed."""
        with self._lock:
            breaker = self._breakers[dependency]
            if not breaker.trip(reason, time.monotonic()):
                breaker.probed(reason, time.monotonic())
        self.changed.set()

    def _probe(self, name: Dependency, breaker: Breaker, now: float) -> None:
        """See whether a dependency is back; the store is asked from a thread, and a trial shows it of the others."""
        if name is not Dependency.STORE:
            breaker.probed(None, now)
        else:
            self._ask(1)

    def _ask(self, tries: int) -> None:
        """Ask the store from a thread, unless one is at it; see `_ask_store`."""
        if self._probing is None or not self._probing.is_alive():
            self._asked_at = time.monotonic()
            self._probing = threading.Thread(target=self._ask_store, args=[tries], name="store-probe", daemon=True)
            self._probing.start()

    def _is_late(self, now: float) -> bool:
        """Say whether a store that counts as well has been asked for so long that it does not any more."""
        asking = self._probing is not None and self._probing.is_alive()
        well = self._breakers[Dependency.STORE].state is not BreakerState.OPEN
        return asking and well and now > self._asked_at + _LATE_SECONDS

    def _ask_store(self, tries: int) -> None:
        """Note whether the store serves, which one of so many tries in a row must show."""
        reason = None
        for _ in range(tries):
            try:
                self._probe_store()
            except Exception as error:
                # Whatever it is, the store does not serve.
                reason = describe(error)
            else:
                reason = None
                break
        with self._lock:
            breaker, now = self._breakers[Dependency.STORE], time.monotonic()
            was_out, self._asked_at = breaker.state is BreakerState.OPEN, now
            if was_out:
                breaker.probed(reason, now)
        if not was_out and reason is not None:
            self.fault(Dependency.STORE, reason)
        elif was_out:
            log.info("store probed: %s", reason or "it answers")
            self.changed.set()


class StoreProbe:
    """Asks a store whether it takes, gives and removes a few bytes."""

    def __init__(self, url: str, owner: str) -> None:
        """Probe the store at `url`, under a name that no other owner uses."""
        self._url, self._key = url, hashlib.sha256(owner.encode()).hexdigest()
        self._store: Store | None = None

    def __call__(self) -> None:
        """Raise StoreError unless it does."""
        if self._store is None:
            self._store = open_store(self._url, quick=True)
        self._store.put_note(PROBE, self._key, b"quantmill")
        self._store.delete_note(PROBE, self._key)
