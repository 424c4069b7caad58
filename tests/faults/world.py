"""A small service to disturb: several schedulers on one database, a store, and users, all in this process."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.executor import real_time
from tests.faults.graphs import GRAPHS
from tests.faults.member import Member
from tests.faults.service import Service

_LOG = logging.getLogger("orchestrator")
#: A lease of the schedulers that are disturbed, in seconds: short, so that one who stands still loses it.
LEASE_SECONDS = 0.6
#: The same in the end, when nothing is to be lost.
CALM_LEASE_SECONDS = 30.0


class World(Service):
    """What faults are done to."""

    def __init__(self, url: str, folder: Path, dice: random.Random, schedulers: int) -> None:
        """Begin with so many schedulers and no job; the database at `url` has the schema and is watched."""
        (folder / "store").mkdir()
        super().__init__(url, folder / "store", dice, GRAPHS)
        self.folder = folder
        self.members: list[Member] = []
        self._numbers = itertools.count()
        self._skew = 0.0
        self._store_back: threading.Timer | None = None
        self._ear = _Ear(self)
        _LOG.addHandler(self._ear)
        for _ in range(schedulers):
            self.add_member()

    def add_member(self, lease_seconds: float = LEASE_SECONDS) -> Member:
        """Start another scheduler."""
        name = f"scheduler-{next(self._numbers)}"
        self.members.append(Member(name, self.url, self.folder, self.bodies, lease_seconds))
        return self.members[-1]

    def victim(self) -> Member | None:
        """Return a scheduler that lives, if one does."""
        living = [member for member in self.members if member.alive]
        return self.dice.choice(living) if living else None

    def set_clock(self, seconds: float) -> None:
        """Let the program's clock differ from the database's by so much."""
        self._skew = seconds

    @contextmanager
    def own_clock(self) -> Iterator[None]:
        """Let the program's clock be ours."""
        before = time.time
        time.time = lambda: real_time() + self._skew
        try:
            yield
        finally:
            time.time = before

    def calm(self) -> None:
        """End all faults: what stands still goes on, what is to happen does not."""
        self.set_clock(0.0)
        if self._store_back is not None:
            self._store_back.join()
        for thread in self.users:
            thread.join(self.silence_seconds)
        for member in self.members:
            member.mend()
            if member.executor is not None:
                member.executor.orders.faults.clear()
                member.executor.orders.no_capacity_until = 0.0
                member.executor.orders.late = member.executor.orders.lost = 0
        if not any(member.alive for member in self.members):
            self.add_member()

    def replace_members(self) -> None:
        """Let all schedulers leave, and start one whose leases are long."""
        for member in self.members:
            if member.alive:
                member.leave()
        for member in self.members:
            member.join(self.silence_seconds)
        self.add_member(CALM_LEASE_SECONDS)

    def spoil_blob(self, *, deleted: bool) -> None:
        """Delete a recorded blob, or change its bytes and not its size."""
        rows = self.recorder.query("SELECT outputs FROM results WHERE kind = 'noop' ORDER BY key")
        if not rows:
            return
        outputs = self.dice.choice(rows)["outputs"]
        (digest,) = (json.loads(outputs) if isinstance(outputs, str) else outputs).values()
        path = self.blob(digest)
        self.spoiled[digest] += 1
        if deleted:
            path.unlink(missing_ok=True)
        elif path.is_file():
            data = path.read_bytes()
            path.chmod(0o644)
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])

    def take_store(self, seconds: float) -> None:
        """Take the store away, and bring it back after a while."""
        store, away = self.folder / "store", self.folder / "store-away"
        with self.lock:
            if store.is_dir() and not away.exists():
                store.rename(away)
                self._store_back = threading.Timer(seconds, lambda: away.rename(store))
                self._store_back.daemon = True
                self._store_back.start()

    def crashes(self) -> list[str]:
        """Return what schedulers and users died of that nobody killed."""
        died = [(each.name, each.crash) for each in self.members if each.crash is not None]
        return super().crashes() + [f"{name}: {type(crash).__name__}: {crash}" for name, crash in died]

    def close(self) -> None:
        """End everything."""
        for member in self.members:
            member.close()
        self.recorder.close()
        _LOG.removeHandler(self._ear)


class _Ear(logging.Handler):
    """Hears what schedulers warn of: one whose statement was refused says so and tries again."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """Tell the world."""
        self._world.note_refusal(record.getMessage())
