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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from orchestrator.db.picking import wanted_gpus
from orchestrator.db.queries import (
    check_end,
    claim_tasks,
    fail_task,
    find_job,
    finish_tasks,
    note_stopped,
    nothing_left,
    release_task,
    release_tasks,
    work_left,
)
from orchestrator.db.rows import ClaimedTask, Lease, TaskEnd
from orchestrator.db.searches import find_search
from orchestrator.db.session import Database, Session, lock_graph, notify_others, ready_count
from orchestrator.db.timings import device_timings
from orchestrator.errors import OUTAGES, DatabaseError, ResultError
from orchestrator.scheduling.deadlines import Deadlines
from orchestrator.scheduling.leases import LeaseKeeper, Reaper
from orchestrator.scheduling.losses import examine_loss
from orchestrator.scheduling.outages import Outages, Pauses, StoreProbe
from orchestrator.scheduling.picker import Places
from orchestrator.scheduling.placement import Placement
from orchestrator.scheduling.presence import Presence
from orchestrator.scheduling.task_log import TaskLog
from orchestrator.scheduling.wakeup import Wakeup
from orchestrator.scheduling.watch import Watch
from orchestrator.states import ACTIVE_JOBS
from workers.errors import Dependency, ExecutorError, Fault
from workers.execution.cluster import own_versions
from workers.execution.execute import TaskCall
from workers.execution.executor import Executor, Finished
from workers.storage.store import CACHE_LIMIT_BYTES

log = logging.getLogger(__name__)

T = TypeVar("T")

# A claim takes at most so many tasks.
_CLAIM_LIMIT = 64
# With more tasks in flight than this for each CPU, ends are collected for a moment and recorded together.
_MANY_PER_CPU = 4.0
_LINGER_SECONDS = 0.005
# Others are told of tasks that became ready and were not claimed here at most this often.
_TELL_SECONDS = 0.1
_SHORTEST_POLL_SECONDS = 0.02
# Signals and lost leases are noticed within this time.
_LONGEST_WAIT_SECONDS = 0.25
_LEARNING_SECONDS = 10.0


def owner_name() -> str:
    """Return what this process' leases have as their owner."""
    return f"{socket.gethostname()}:{os.getpid()}"


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
    owner: str = field(default_factory=owner_name)


@dataclass(frozen=True, slots=True)
class Served:
    """What a scheduler has done: whether it came to its end or was stopped, and what it found to do.

    `executed` counts the tasks that ended well here; `found_work` is False if no job was ever left to execute.
    """

    stopped: bool
    found_work: bool
    executed: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of an attempt that gave no result; `lost` are digests of blobs that it could not read."""

    lease: Lease
    fault: Fault
    error: str
    lost: tuple[str, ...] = ()


class Scheduler:
    """One orchestrator; any number may work on one database."""

    def __init__(
        self,
        database: Database,
        executor_factory: Callable[[], Executor],
        config: SchedulerConfig,
        watch: Watch | None = None,
        between: Callable[[], float] | None = None,
    ) -> None:
        """Work on `database` with executors from `executor_factory`, called when there is work and after each loss.

        `watch` is told what happens. `between` is called between claims: it does what else there is to do, and returns
        in how many seconds it wants to be called again.
        """
        self._database = database
        self._executor_factory = executor_factory
        self._config = config
        self._executor: Executor | None = None
        self._in_flight: dict[int, ClaimedTask] = {}
        # What lost its lease, and when: its executor was told to end it, and says so when it has.
        self._stopping: dict[int, tuple[Lease, float]] = {}
        self._stopped: list[Lease] = []
        self._places = Places(config.in_flight)
        self._ended: list[tuple[ClaimedTask, Finished]] = []
        self._watch = watch or Watch()
        self._tasks = TaskLog(database)
        self._keeper = LeaseKeeper(database, config.lease_seconds)
        self._wakeup = Wakeup(database)
        self._reaper = Reaper(database, config.lease_seconds)
        self._deadlines = Deadlines(database)
        self._outages = Outages(config.pauses, StoreProbe(config.store_url, config.owner))
        self._presence = Presence(database, config.owner, self._outages, self.cluster)
        self._worked: set[Dependency] = set()
        self._stop = threading.Event()
        self._found_work = self._said_no_gpu = False
        self._executed = 0
        self._poll = _SHORTEST_POLL_SECONDS
        self._between = between
        self._next_claim = self._next_look = self._next_telling = self._next_learning = self._next_between = 0.0

    def run(
        self,
        *,
        drain: bool = False,
        stop: threading.Event | None = None,
        until_job: str | None = None,
        until_search: str | None = None,
    ) -> Served:
        """Schedule until told to end; a scheduler runs once.

        Parameters
        ----------
        drain
            End when no job is left that has not ended.
        stop
            End when it is set: tasks in flight are given back, at no cost to them.
        until_job, until_search
            End when this job, or this search, has ended.

        Returns
        -------
        Served
            `stopped` is False exactly if what `drain` or the last two wait for has come.

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
        self._wakeup.start()
        self._presence.start()
        done = False
        try:
            while not self._stop.is_set() and not (done := self._is_done(drain, until_job, until_search)):
                self._pass()
        except (*OUTAGES, ExecutorError):
            # Who is told to end while something is out has not failed.
            if not self._stop.is_set():
                raise
        finally:
            self._close()
        return Served(not done, self._found_work, self._executed)

    def _is_done(self, drain: bool, until_job: str | None, until_search: str | None) -> bool:
        """Say whether what the scheduler was started for has been reached; starts the executor if it is needed."""
        self._do_between()
        now = time.monotonic()
        idle = not self._in_flight and not self._ended
        if now < self._next_look and not (idle and self._executor is not None and self._poll > _SHORTEST_POLL_SECONDS):
            return False
        self._next_look = now + _LONGEST_WAIT_SECONDS
        ended, left = self._patiently(lambda: self._look(until_job, until_search))
        self._found_work = self._found_work or left
        if ended or (drain and idle and not left and self._patiently(self._is_drained)):
            return True
        if self._executor is None and left:
            self._start_executor()
        return False

    def _look(self, job: str | None, search: str | None) -> tuple[bool, bool]:
        """Return whether the job or search has ended, and whether any has not."""
        with self._database.session(read_only=True) as session:
            ended = job is not None and find_job(session, job).state not in ACTIVE_JOBS
            ended = ended or (search is not None and find_search(session, search).state not in ACTIVE_JOBS)
            return ended, work_left(session)

    def _do_between(self) -> None:
        """Do what is to be done between claims, where that is due."""
        if self._between is not None and time.monotonic() >= self._next_between:
            self._next_between = time.monotonic() + self._patiently(self._between)

    def _is_drained(self) -> bool:
        """Say whether no job is left, nor one that is being submitted: the look above sees what has been committed."""
        with self._database.session() as session:
            return nothing_left(session)

    def _pass(self) -> None:
        """Wait for something to do, and do it."""
        self._watch.passed()
        if self._executor is None:
            self._idle(min(self._config.poll_seconds, _LONGEST_WAIT_SECONDS))
            return
        self._collect(self._executor)
        if not self._executor.alive():
            self._lose_executor(self._executor)
        if self._ended or self._stopped or time.monotonic() >= self._next_claim:
            self._record_and_claim()
        self._reap()

    def _collect(self, executor: Executor) -> None:
        """Wait for tasks to end; drop those whose leases were lost."""
        timeout = max(0.0, min(self._next_claim - time.monotonic(), _LONGEST_WAIT_SECONDS))
        if self._in_flight:
            self._take(executor.wait(timeout))
            if self._ended and len(self._in_flight) > _MANY_PER_CPU * executor.capacity().cpus:
                self._stop.wait(_LINGER_SECONDS)
                self._take(executor.wait(0.0))
        else:
            self._idle(timeout)
            if self._stopping:
                self._take(executor.wait(0.0))
        self._drop_lost(executor)

    def _take(self, ended: list[Finished]) -> None:
        for finished in ended:
            # Of one whose lease was lost it only counts that it has ended: what it did is another's business now.
            if finished.handle in self._stopping:
                self._stopped.append(self._stopping.pop(finished.handle)[0])
            elif finished.handle in self._in_flight:
                self._end(self._in_flight.pop(finished.handle), finished)

    def _idle(self, seconds: float) -> None:
        """Wait, but not on when there may be something to claim."""
        if self._wakeup.wait(seconds):
            self._next_claim = self._next_look = 0.0
            self._poll = _SHORTEST_POLL_SECONDS

    def _end(self, task: ClaimedTask, finished: Finished) -> None:
        """Note the end of a task, to be recorded with the next transaction."""
        if finished.fault is Fault.LOST:
            look = partial(examine_loss, self._database, self._config.store_url, task.lease.task_id, finished)
            finished = self._patiently(look)
        if finished.fault is Fault.OUTAGE:
            self._outages.fault(finished.dependency or Dependency.CLUSTER, finished.error)
        if finished.output is not None:
            self._executed += 1
            self._outages.success(Dependency.STORE, Dependency.CLUSTER)
            self._places.pace.note(task.kind, task.version, float(finished.output.metrics["seconds"]))
        if finished.fault is Fault.REFUSED:
            self._places.refuse(task.lease.task_id, finished.error)
        self._places.end(task.lease.task_id)
        self._watch.ended(task, finished)
        self._tasks.ended(task, finished)
        self._ended.append((task, finished))

    def _drop_lost(self, executor: Executor) -> None:
        """Stop the tasks whose leases were lost."""
        lost = set(self._keeper.take_lost())
        for handle, task in list(self._in_flight.items()):
            if task.lease in lost:
                self._watch.lost(task)
                self._tasks.warn("lease lost", task)
                executor.cancel(handle)
                self._places.end(task.lease.task_id)
                self._stopping[handle] = (self._in_flight.pop(handle).lease, time.monotonic())
        # Of some calls that were cancelled no end is told; nobody waits for those for longer than a lease.
        too_old = time.monotonic() - self._config.lease_seconds
        self._stopping = {handle: each for handle, each in self._stopping.items() if each[1] > too_old}

    def _record_and_claim(self) -> None:
        """Record what has ended and claim what there is room for, in one transaction; then start it."""
        assert self._executor is not None
        executor = self._executor
        self._places.look(executor.capacity().node_list())
        limit = self._outages.room(len(self._in_flight), _CLAIM_LIMIT)
        room = not self._stop.is_set() and self._places.has_room()
        self._outages.starved(yes=not room and not (self._in_flight or self._stop.is_set()))
        if room and time.monotonic() >= self._next_learning:
            self._next_learning = time.monotonic() + _LEARNING_SECONDS
            self._patiently(self._learn)
        claimed, dropped = self._patiently(lambda: self._record(limit=limit if room else 0))
        if room and limit and not (claimed or self._in_flight or self._said_no_gpu):
            self._patiently(self._say_what_waits)
        self._keeper.drop([task.lease for task, _ in self._ended])
        self._keeper.add([task.lease for task in claimed])
        progress = bool(claimed or self._ended)
        self._ended.clear()
        self._stopped.clear()
        self._poll = _SHORTEST_POLL_SECONDS if progress else min(self._poll * 2, self._config.poll_seconds)
        self._next_claim = time.monotonic() + self._poll
        self._submit(executor, claimed)
        self._watch.occupied(executor.capacity(), self._places.occupied(), len(self._in_flight))
        if dropped:
            self._ended += self._patiently(lambda: self._revived(dropped))

    def _revived(self, dropped: list[tuple[ClaimedTask, Finished]]) -> list[tuple[ClaimedTask, Finished]]:
        """Return what is to be recorded again, as its lease had run out and nobody has taken it."""
        good = self._keeper.revive([task.lease for task, _ in dropped])
        for task, _ in dropped:
            if task.lease not in good:
                self._tasks.warn("result dropped: the lease was lost", task)
                self._stopped.append(task.lease)
        return [(task, finished) for task, finished in dropped if task.lease in good]

    def _record(
        self, *, limit: int, give_back: Sequence[Lease] = ()
    ) -> tuple[list[ClaimedTask], list[tuple[ClaimedTask, Finished]]]:
        """In one transaction, record the ends of tasks, give tasks back, and claim what there is room for.

        Returns
        -------
        list of ClaimedTask, list of (ClaimedTask, Finished)
            What was claimed, `limit` at most, and the ends that were not recorded, as the leases had run out.
        """
        ends, faults = self._sorted_ends()
        claimed, kept, places = self._database.transact(partial(self._write, limit, give_back, ends, faults))
        self._places.running |= {task.lease.task_id: places[task.lease.task_id] for task in claimed}
        return claimed, [(task, finished) for task, finished in self._ended if task.lease not in kept]

    def _sorted_ends(self) -> tuple[list[TaskEnd], list[Failure]]:
        """Return the ends that can be recorded as results, and the faults, with an error each."""
        ends: list[TaskEnd] = []
        faults: list[Failure] = []
        for task, finished in self._ended:
            if finished.output is None:
                fault = finished.fault or Fault.INFRASTRUCTURE
                faults.append(Failure(task.lease, fault, finished.error, finished.lost))
                continue
            metrics = finished.output.metrics
            end = TaskEnd(task.lease, finished.output.outputs, metrics, float(metrics["seconds"]), finished.output.ran)
            try:
                check_end(end)
            except ResultError as refusal:
                faults.append(Failure(task.lease, Fault.TASK, str(refusal)))
            else:
                ends.append(end)
        return ends, faults

    def _write(
        self,
        limit: int,
        give_back: Sequence[Lease],
        ends: Sequence[TaskEnd],
        faults: Sequence[Failure],
        session: Session,
    ) -> tuple[list[ClaimedTask], set[Lease], dict[str, Placement]]:
        """Do what `_record` says; return what was claimed, the leases of the ends that were recorded, and places."""
        if faults or self._stopped or give_back:
            # They need the graph alone, and who has shared it before cannot have it without a risk of deadlock.
            lock_graph(session)
        kept = set(finish_tasks(session, ends))
        for each in faults:
            if each.fault is Fault.OUTAGE:
                is_kept = release_task(session, each.lease, each.error)
            else:
                is_kept = fail_task(session, each.lease, fault=each.fault.value, error=each.error, lost=each.lost)
            if is_kept:
                kept.add(each.lease)
        release_tasks(session, give_back)
        note_stopped(session, [*self._stopped, *give_back])
        picker = self._places.picker(limit)
        claimed = []
        if limit:
            config = self._config
            claimed = claim_tasks(
                session, owner=config.owner, limit=limit, lease_seconds=config.lease_seconds, picker=picker
            )
        now = time.monotonic()
        if ready_count(session) > len(claimed) and now >= self._next_telling:
            self._next_telling = now + _TELL_SECONDS
            notify_others(session)
        return claimed, kept, picker.placements

    def _say_what_waits(self) -> None:
        """Warn, once, of tasks that wait for a GPU that the cluster does not have."""
        with self._database.session(read_only=True) as session:
            wanted = wanted_gpus(session)
        if wanted:
            self._said_no_gpu = True
            log.warning("tasks wait for a GPU: wanted %s, got %s", " or ".join(wanted), self._places.gpu_text())

    def _learn(self) -> None:
        """Read what tasks took, for the room that the next ones are given."""
        with self._database.session(read_only=True) as session:
            self._places.learned = device_timings(session)

    def cluster(self) -> dict[str, Any]:
        """Return the nodes that this scheduler sees and what of them is in use, as JSON; callable from any thread."""
        return self._places.document()

    def _submit(self, executor: Executor, claimed: list[ClaimedTask]) -> None:
        """Start claimed tasks; a task for which the executor is gone is a fault of the infrastructure."""
        for task in claimed:
            try:
                handle = executor.submit(self._call(task))
            except ExecutorError as error:
                self._end(task, Finished(-1, None, Fault.INFRASTRUCTURE, str(error)))
            else:
                self._in_flight[handle] = task
        self._tasks.started(claimed)

    def _call(self, task: ClaimedTask) -> TaskCall:
        place = self._places.running[task.lease.task_id]
        return TaskCall(
            kind=task.kind,
            version=task.version,
            params=task.params,
            inputs=task.inputs,
            store_url=self._config.store_url,
            cache_dir=str(self._config.cache_dir),
            cache_bytes=self._config.cache_bytes,
            device=place.device,
            threads=max(1, int(place.cpus)),
            cpus=place.cpus,
            gpus=place.gpus,
            memory_bytes=place.memory_bytes,
            node=place.node,
            host=place.host,
            gpu_type=place.gpu_type,
            batch_divisor=task.wishes.batch_divisor,
            deterministic=task.wishes.deterministic,
            versions=dict(own_versions()),
            deadline_seconds=self._deadlines.of(task),
            # One that failed before may take a worker with it; it runs by itself.
            brief=task.lease.attempt == 1 and self._places.pace.is_brief(task.kind, task.version),
        )

    def _reap(self) -> None:
        """Take back what other orchestrators left behind, and learn what tasks take, now and then."""
        if self._reaper.is_due():
            self._watch.reaped(self._patiently(self._reaper.reap))
            self._patiently(self._deadlines.learn)

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
        self._stopped += [lease for lease, _ in self._stopping.values()]
        self._stopping.clear()
        self._executor = None
        self._places = Places(self._config.in_flight, self._places.learned)
        self._start_executor()

    def _close(self) -> None:
        """Stop the executor, then give back what was in flight: nobody begins a task whose body still runs here."""
        if self._executor is not None:
            self._executor.shutdown()
        self._keeper.stop()
        self._wakeup.stop()
        self._presence.stop()
        leases = [task.lease for task in self._in_flight.values()]
        self._stopped += [lease for lease, _ in self._stopping.values()]
        try:
            if leases or self._ended or self._stopped:
                _, dropped = self._record(limit=0, give_back=leases)
                self._ended.clear()
                self._stopped = [task.lease for task, _ in dropped]
                log.info("gave back %d tasks in flight", len(leases))
            if self._stopped:
                self._record(limit=0)
        except DatabaseError as error:
            # The leases run out by themselves.
            log.warning("tasks in flight not given back: %s", error)
        finally:
            self._in_flight.clear()

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
                self._watch.passed(waiting_for=str(error))
                failed = True
            else:
                self._worked.add(dependency)
                if dependency is Dependency.DATABASE or failed:
                    self._outages.success(dependency)
                if failed:
                    self._reaper.postpone_after(time.monotonic() - begun)
                return result
            self._stop.wait(pause)


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
