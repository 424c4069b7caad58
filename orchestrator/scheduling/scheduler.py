"""Takes tasks from the queue, runs them on an executor, and records what became of them.

The database is the truth and the executor disposable: whatever dies, the rest goes on or can be started again, and no
task that had finished runs again. One pass of the loop is one transaction: it records what has ended and claims what
there is room for, so that a chain of short tasks costs one transaction a task.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from orchestrator.db.queries import (
    claim_tasks,
    fail_task,
    find_job,
    finish_task,
    nothing_left,
    release_task,
    work_left,
)
from orchestrator.db.rows import ClaimedTask, Lease
from orchestrator.db.session import Database
from orchestrator.errors import OUTAGES, DatabaseError, ResultError
from orchestrator.graph import Resources
from orchestrator.scheduling.deadlines import Deadlines
from orchestrator.scheduling.leases import LeaseKeeper, Reaper
from orchestrator.scheduling.outages import Outages, Pauses, StoreProbe
from orchestrator.scheduling.presence import Presence
from orchestrator.states import ACTIVE_JOBS
from workers.errors import Dependency, ExecutorError, Fault
from workers.execution.execute import TaskCall
from workers.execution.executor import Executor, Finished
from workers.storage.store import CACHE_LIMIT_BYTES

log = logging.getLogger(__name__)

T = TypeVar("T")

# A claim reads at most so many rows.
_CLAIM_LIMIT = 64
_SHORTEST_POLL_SECONDS = 0.02
# Signals and lost leases are noticed within this time.
_LONGEST_WAIT_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How a scheduler works.

    `store_url`, `cache_dir` and `cache_bytes` are passed to every task. A lease lasts `lease_seconds`, so that is how
    long the tasks of an orchestrator that was killed wait for the next one. `in_flight` is how many times the cluster's
    capacity may be claimed, so that Ray always has a next task. An idle scheduler asks the database every
    `poll_seconds`. A database or cluster that does not answer at first is tried again for `patience_seconds`; one that
    did, and the store, for ever, after `pauses`.
    """

    store_url: str
    cache_dir: Path
    cache_bytes: int = CACHE_LIMIT_BYTES
    lease_seconds: float = 30.0
    in_flight: float = 2.0
    poll_seconds: float = 1.0
    patience_seconds: float = 120.0
    pauses: Pauses = field(default_factory=Pauses)
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")


@dataclass(frozen=True, slots=True)
class Served:
    """What a scheduler has done: whether it came to its end or was stopped, and what it found to do.

    `executed` counts the tasks that ended well here; `found_work` is False if no job was ever left to execute.
    """

    stopped: bool
    found_work: bool
    executed: int


class Scheduler:
    """One orchestrator; any number may work on one database."""

    def __init__(self, database: Database, executor_factory: Callable[[], Executor], config: SchedulerConfig) -> None:
        """Work on `database` with executors from `executor_factory`, called when there is work and after each loss."""
        self._database = database
        self._executor_factory = executor_factory
        self._config = config
        self._executor: Executor | None = None
        self._in_flight: dict[int, ClaimedTask] = {}
        self._ended: list[tuple[ClaimedTask, Finished]] = []
        self._keeper = LeaseKeeper(database, config.lease_seconds)
        self._reaper = Reaper(database, config.lease_seconds)
        self._deadlines = Deadlines(database)
        self._outages = Outages(config.pauses, StoreProbe(config.store_url, config.owner))
        self._presence = Presence(database, config.owner, self._outages, self._cluster)
        self._worked: set[Dependency] = set()
        self._stop = threading.Event()
        self._found_work = False
        self._executed = 0
        self._poll = _SHORTEST_POLL_SECONDS
        self._next_claim = self._next_look = 0.0

    def run(
        self,
        *,
        drain: bool = False,
        stop: threading.Event | None = None,
        until_job: str | None = None,
    ) -> Served:
        """Schedule until told to end; a scheduler runs once.

        Parameters
        ----------
        drain
            End when no job is left that has not ended.
        stop
            End when it is set: tasks in flight are given back, at no cost to them.
        until_job
            End when this job has ended.

        Returns
        -------
        Served
            `stopped` is False exactly if what `drain` or `until_job` wait for has come.

        Raises
        ------
        DatabaseError
            If the database does not answer for `patience_seconds` at first, or refuses a statement for as long.
        ExecutorError
            If no first executor can be started for `patience_seconds`.
        """
        if stop is not None:
            self._stop = stop
        self._keeper.start()
        self._presence.start()
        done = False
        try:
            while not self._stop.is_set() and not (done := self._is_done(drain, until_job)):
                self._pass()
        except (*OUTAGES, ExecutorError):
            # Who is told to end while something is out has not failed.
            if not self._stop.is_set():
                raise
        finally:
            self._close()
        return Served(not done, self._found_work, self._executed)

    def _is_done(self, drain: bool, until_job: str | None) -> bool:
        """Say whether what the scheduler was started for has been reached; starts the executor if it is needed."""
        now = time.monotonic()
        idle = not self._in_flight and not self._ended
        if now < self._next_look and not (idle and self._executor is not None and self._poll > _SHORTEST_POLL_SECONDS):
            return False
        self._next_look = now + _LONGEST_WAIT_SECONDS
        ended, left = self._patiently(lambda: self._look(until_job))
        self._found_work = self._found_work or left
        if ended or (drain and idle and not left and self._patiently(self._is_drained)):
            return True
        if self._executor is None and left:
            self._start_executor()
        return False

    def _look(self, job: str | None) -> tuple[bool, bool]:
        """Return whether the job has ended, and whether any job has not."""
        with self._database.session(read_only=True) as session:
            ended = job is not None and find_job(session, job).state not in ACTIVE_JOBS
            return ended, work_left(session)

    def _is_drained(self) -> bool:
        """Say whether no job is left, nor one that is being submitted: the look above sees what has been committed."""
        with self._database.session() as session:
            return nothing_left(session)

    def _pass(self) -> None:
        """Wait for something to do, and do it."""
        if self._executor is None:
            self._stop.wait(min(self._config.poll_seconds, _LONGEST_WAIT_SECONDS))
            return
        self._collect(self._executor)
        if not self._executor.alive():
            self._lose_executor(self._executor)
        if self._ended or time.monotonic() >= self._next_claim:
            self._record_and_claim()
        self._reap()

    def _collect(self, executor: Executor) -> None:
        """Wait for tasks to end; drop those whose leases were lost."""
        timeout = max(0.0, min(self._next_claim - time.monotonic(), _LONGEST_WAIT_SECONDS))
        if self._in_flight:
            for finished in executor.wait(timeout):
                # One whose lease was lost is no longer known here: what it did is another's business now.
                if finished.handle in self._in_flight:
                    self._end(self._in_flight.pop(finished.handle), finished)
        else:
            self._stop.wait(timeout)
        self._drop_lost(executor)

    def _end(self, task: ClaimedTask, finished: Finished) -> None:
        """Note the end of a task, to be recorded with the next transaction."""
        if finished.fault is Fault.OUTAGE:
            self._outages.fault(finished.dependency or Dependency.CLUSTER, finished.error)
        if finished.output is None:
            log.warning("task failed: %s", finished.error, extra=_about(task) | {"fault": str(finished.fault)})
        else:
            self._executed += 1
            self._outages.success(Dependency.STORE, Dependency.CLUSTER)
            log.debug("task finished", extra=_about(task))
        self._ended.append((task, finished))

    def _drop_lost(self, executor: Executor) -> None:
        """Stop the tasks whose leases were lost."""
        lost = set(self._keeper.take_lost())
        for handle, task in list(self._in_flight.items()):
            if task.lease in lost:
                log.warning("lease lost", extra=_about(task))
                executor.cancel(handle)
                del self._in_flight[handle]

    def _record_and_claim(self) -> None:
        """Record what has ended and claim what there is room for, in one transaction; then start it."""
        assert self._executor is not None
        executor = self._executor
        limit = self._outages.room(len(self._in_flight), _CLAIM_LIMIT)
        room = None if self._stop.is_set() else self._room(executor)
        self._outages.starved(yes=room is None and not (self._in_flight or self._stop.is_set()))
        claimed, dropped = self._patiently(lambda: self._record(room if limit else None, limit=limit))
        self._keeper.drop([task.lease for task, _ in self._ended])
        self._keeper.add([task.lease for task in claimed])
        progress = bool(claimed or self._ended)
        self._ended.clear()
        self._poll = _SHORTEST_POLL_SECONDS if progress else min(self._poll * 2, self._config.poll_seconds)
        self._next_claim = time.monotonic() + self._poll
        self._submit(executor, claimed)
        if dropped:
            self._ended += self._patiently(lambda: self._revived(dropped))

    def _revived(self, dropped: list[tuple[ClaimedTask, Finished]]) -> list[tuple[ClaimedTask, Finished]]:
        """Return what is to be recorded again, as its lease had run out and nobody has taken it."""
        good = self._keeper.revive([task.lease for task, _ in dropped])
        for task, _ in dropped:
            if task.lease not in good:
                log.warning("result dropped: the lease was lost", extra=_about(task))
        return [(task, finished) for task, finished in dropped if task.lease in good]

    def _record(
        self, room: Resources | None, give_back: Sequence[Lease] = (), *, limit: int = _CLAIM_LIMIT
    ) -> tuple[list[ClaimedTask], list[tuple[ClaimedTask, Finished]]]:
        """In one transaction, record the ends of tasks, give tasks back, and claim what fits into `room`.

        Returns
        -------
        list of ClaimedTask, list of (ClaimedTask, Finished)
            What was claimed, and the ends that were not recorded, as the leases had run out.
        """
        config, dropped = self._config, []
        with self._database.session() as session:
            for task, finished in self._ended:
                output, fault, error = finished.output, finished.fault or Fault.INFRASTRUCTURE, finished.error
                if output is not None:
                    try:
                        kept = finish_task(
                            session, task.lease, output.outputs, output.metrics, float(output.metrics["seconds"])
                        )
                    except ResultError as refusal:
                        output, fault, error = None, Fault.TASK, str(refusal)
                if output is None and fault is Fault.OUTAGE:
                    kept = release_task(session, task.lease, error)
                elif output is None:
                    kept = fail_task(session, task.lease, fault=fault.value, error=error)
                if not kept:
                    dropped.append((task, finished))
            for lease in give_back:
                release_task(session, lease)
            claim = partial(claim_tasks, session, owner=config.owner, lease_seconds=config.lease_seconds)
            claimed = claim(limit=limit, capacity=room) if room is not None else []
            if room is not None and not claimed and not self._in_flight:
                # A task that asks for more than the cluster has runs when nothing else does.
                huge = Resources(cpus=float(sys.maxsize), gpus=room.gpus, memory_bytes=sys.maxsize)
                claimed = claim(limit=1, capacity=huge)
        return claimed, dropped

    def _room(self, executor: Executor) -> Resources | None:
        """Return what may still be claimed; None if nothing."""
        capacity, factor = executor.capacity(), self._config.in_flight
        used = [task.resources for task in self._in_flight.values()]
        cpus = capacity.cpus * factor - sum(each.cpus for each in used)
        memory = int(capacity.memory_bytes * factor) - sum(each.memory_bytes for each in used)
        gpus = max(0.0, capacity.gpus * factor - sum(each.gpus for each in used))
        return Resources(cpus, gpus, memory) if cpus > 0 and memory >= 0 else None

    def _submit(self, executor: Executor, claimed: list[ClaimedTask]) -> None:
        """Start claimed tasks; a task for which the executor is gone is a fault of the infrastructure."""
        for task in claimed:
            try:
                handle = executor.submit(self._call(task))
            except ExecutorError as error:
                self._end(task, Finished(-1, None, Fault.INFRASTRUCTURE, str(error)))
            else:
                self._in_flight[handle] = task
                log.debug("task started", extra=_about(task))

    def _call(self, task: ClaimedTask) -> TaskCall:
        resources = task.resources
        return TaskCall(
            kind=task.kind,
            version=task.version,
            params=task.params,
            inputs=task.inputs,
            store_url=self._config.store_url,
            cache_dir=str(self._config.cache_dir),
            cache_bytes=self._config.cache_bytes,
            device="cuda" if resources.gpus > 0 else "cpu",
            threads=max(1, int(resources.cpus)),
            cpus=resources.cpus,
            gpus=resources.gpus,
            memory_bytes=resources.memory_bytes,
            deadline_seconds=self._deadlines.of(task),
        )

    def _reap(self) -> None:
        """Take back what other orchestrators left behind, and learn what tasks take, now and then."""
        if self._reaper.is_due():
            self._patiently(self._reaper.reap)
            self._patiently(self._deadlines.learn)

    def _cluster(self) -> dict[str, Any]:
        """Return what this orchestrator sees of its cluster, for others to read."""
        executor = self._executor
        seen = {} if executor is None else asdict(executor.capacity())
        return seen | {"tasks_in_flight": len(self._in_flight)}

    def _start_executor(self) -> None:
        self._patiently(self._deadlines.learn)
        self._executor = self._patiently(self._executor_factory, Dependency.CLUSTER)
        log.info("executor started: %s", self._executor.capacity())

    def _lose_executor(self, executor: Executor) -> None:
        """Count the executor's loss against its tasks, record that, and start another."""
        log.error("executor lost with %d tasks in flight", len(self._in_flight))
        lost = Finished(-1, None, Fault.INFRASTRUCTURE, "ray: the cluster or its driver was lost")
        for task in self._in_flight.values():
            self._end(task, lost)
        self._in_flight.clear()
        executor.shutdown()
        self._executor = None
        self._start_executor()

    def _close(self) -> None:
        """Give back what is in flight, and stop the executor."""
        self._keeper.stop()
        self._presence.stop()
        leases = [task.lease for task in self._in_flight.values()]
        try:
            if leases or self._ended:
                self._record(None, leases)
                log.info("gave back %d tasks in flight", len(leases))
        except DatabaseError as error:
            # The leases run out by themselves.
            log.warning("tasks in flight not given back: %s", error)
        finally:
            self._in_flight.clear()
            if self._executor is not None:
                self._executor.shutdown()

    def _patiently(self, work: Callable[[], T], dependency: Dependency = Dependency.DATABASE) -> T:
        """Do something that needs the database or the cluster, again and again if they do not answer.

        For ever, if they ever did: whoever waits for work to go on finds it where it was.
        """
        begun, failed = time.monotonic(), False
        while True:
            try:
                if failed and dependency is Dependency.DATABASE:
                    self._keeper.renew()
                result = work()
            except (DatabaseError, ExecutorError) as error:
                self._outages.failed_again(dependency, str(error))
                pause = self._outages.pause(dependency)
                for_ever = dependency in self._worked and isinstance(error, (*OUTAGES, ExecutorError))
                if self._stop.is_set() or (
                    not for_ever and time.monotonic() + pause > begun + self._config.patience_seconds
                ):
                    raise
                log.warning("trying again in %.1f s: %s", pause, error)
                failed = True
            else:
                self._worked.add(dependency)
                if dependency is Dependency.DATABASE or failed:
                    self._outages.success(dependency)
                if failed:
                    self._reaper.postpone_after(time.monotonic() - begun)
                return result
            self._stop.wait(pause)


def _about(task: ClaimedTask) -> dict[str, object]:
    """Return the fields of a log record about a task."""
    return {"task": task.lease.task_id, "attempt": task.lease.attempt, "kind": task.kind}


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts. For the main thread."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
