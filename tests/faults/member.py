"""A scheduler that can be killed, stopped or disturbed at any statement, commit, or call of its executor.

It stands for a process: what it holds is its own, and once it is killed nothing that it does reaches anything. The
hooks are in its database's engine and commits and in its executor, so that its code is as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from orchestrator.db.session import Database, open_database
from orchestrator.errors import DatabaseError
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from tests.faults.executor import FaultyExecutor
from tests.faults.history import Body
from workers.errors import ExecutorError

#: Where something may happen: at a statement, before or after a commit, where calls are submitted or waited for.
MOMENTS = ("statement", "before", "after", "submit", "wait")


@contextmanager
def silent_deaths() -> Iterator[None]:
    """Let threads of what was killed end without a word."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@dataclass(slots=True)
class Trap:
    """What happens at the moment `moment` once it has come `skip` times; `count` times in a row."""

    moment: str
    skip: int
    spring: Callable[[], None]
    count: int = 1


class Hooked:
    """A database whose every statement and commit passes a gate; once it is killed, each ends its thread silently."""

    def __init__(self, url: str) -> None:
        """Open the database."""
        self.database: Database = open_database(url)
        self.database.commit_hook = self.gate
        event.listen(self.database.engine, "before_cursor_execute", lambda *_: self.gate("statement"))
        self._lock = threading.Lock()
        self._traps: list[Trap] = []
        self._open = threading.Event()
        self._open.set()
        self.killed = False
        self.sprung = 0

    def gate(self, moment: str) -> None:
        """Let a call pass, unless something is to happen to it."""
        self._open.wait()
        if self.killed:
            raise SystemExit
        for trap in self._due(moment):
            self.sprung += 1
            trap.spring()
        self._open.wait()
        if self.killed:
            raise SystemExit

    def _due(self, moment: str) -> list[Trap]:
        due = []
        with self._lock:
            for trap in [each for each in self._traps if each.moment in (moment, "anywhere")]:
                if trap.skip > 0:
                    trap.skip -= 1
                    continue
                trap.count -= 1
                if trap.count <= 0:
                    self._traps.remove(trap)
                due.append(trap)
        return due

    def set_trap(self, trap: Trap) -> None:
        """Let something happen."""
        with self._lock:
            self._traps.append(trap)

    def kill(self) -> None:
        """Be gone from here on."""
        self.killed = True
        self._open.set()

    def stop(self, seconds: float) -> None:
        """Stand still at the next thing that is done, as after SIGSTOP, and go on by itself."""
        self._open.clear()
        timer = threading.Timer(seconds, self._open.set)
        timer.daemon = True
        timer.start()

    def mend(self) -> None:
        """Nothing more happens."""
        with self._lock:
            self._traps.clear()
        self._open.set()

    def fail(self) -> None:
        """Fail as a database does whose connection breaks."""
        raise DatabaseError("faults: the connection broke")

    def fail_statement(self) -> None:
        """The same in mid-transaction, as the driver says it."""
        raise OperationalError("faults", None, Exception("faults: server closed the connection"))

    def die(self) -> None:
        """Be killed here and now."""
        self.killed = True
        raise SystemExit


class Member(Hooked):
    """A scheduler, its database and its executors."""

    def __init__(self, name: str, url: str, folder: Path, bodies: list[Body], lease_seconds: float) -> None:
        """Begin to schedule."""
        super().__init__(url)
        self.name = name
        self.executors: list[FaultyExecutor] = []
        self.crash: BaseException | None = None
        self._bodies = bodies
        self._ending = threading.Event()
        options: dict[str, Any] = {"lease_seconds": lease_seconds, "poll_seconds": 0.05, "patience_seconds": 60.0}
        config = SchedulerConfig(str(folder / "store"), folder / "cache", owner=name, **options)
        self._scheduler = Scheduler(self.database, self._new_executor, config)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _new_executor(self) -> FaultyExecutor:
        executor = FaultyExecutor(self.name, 3.0, self.gate, self._bodies)
        self.executors.append(executor)
        return executor

    @property
    def executor(self) -> FaultyExecutor | None:
        """The executor at work, if there is one."""
        return self.executors[-1] if self.executors else None

    @property
    def alive(self) -> bool:
        """Whether it schedules, and was not told to leave."""
        return self._thread.is_alive() and not self.killed and not self._ending.is_set()

    def _run(self) -> None:
        try:
            self._scheduler.run(stop=self._ending)
        except SystemExit:
            assert self.killed, "only a scheduler that is killed exits"
        except BaseException as error:
            # Told to leave, it does not wait for a database or a cluster that is out.
            if not (self._ending.is_set() and isinstance(error, DatabaseError | ExecutorError)):
                self.crash = error
        if self.killed:
            for executor in self.executors:
                executor.abandon()

    def leave(self) -> None:
        """End as after SIGTERM: give back what is in flight."""
        self.mend()
        self._ending.set()

    def join(self, seconds: float) -> bool:
        """Wait for its end; say whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Be gone, whatever it does."""
        self.kill()
        self.mend()
        self._ending.set()
        self.join(30.0)
        self.database.close()
