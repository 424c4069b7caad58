"""Outages are waited out: a breaker's states, and jobs whose store, disk or database is taken away for a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.actions.doctor import _orchestrators
from orchestrator.actions.jobs import show_job
from orchestrator.cli.main import run_cli
from orchestrator.db.orchestrators import (
    GONE_SECONDS,
    OrchestratorNote,
    OrchestratorState,
    list_orchestrators,
    see_orchestrator,
    waiting_reason,
)
from orchestrator.db.queries import events, find_job
from orchestrator.db.session import Database, open_database
from orchestrator.scheduling.outages import Breaker, BreakerState, Outages, Pauses
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.service import open_service
from orchestrator.settings import Settings, resolve_settings
from orchestrator.states import JobState
from tests.conftest import S3Server, fill
from tests.orchestrator.in_process import InProcess
from tests.orchestrator.outages import graph, postgres_only, refused, stopped_postgres, submit, until
from workers.errors import Dependency
from workers.execution.execute import TaskCall
from workers.execution.executor import Finished, finished_of
from workers.storage import store_s3

PAUSES = Pauses(first=1.0, longest=8.0)
QUICK = Pauses(first=0.1, longest=0.4)


# Breakers


def test_breaker_opens_for_growing_pauses_up_to_the_longest() -> None:
    breaker, now = Breaker(PAUSES), 100.0
    assert breaker.limit(now) is None
    assert breaker.trip("gone", now)
    for pause in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert breaker.limit(now) == 0
        assert not breaker.is_due(now + pause - 0.01)
        assert breaker.is_due(now + pause)
        now += pause
        breaker.probed("still gone", now)
    assert (breaker.state, breaker.reason) == (BreakerState.OPEN, "still gone")


def test_breaker_takes_faults_that_come_while_it_is_open_for_the_same_outage() -> None:
    breaker = Breaker(PAUSES)
    assert breaker.trip("gone", 0.0)
    assert not any(breaker.trip("gone too", 0.5) for _ in range(9))
    assert breaker.is_due(1.0)


def test_breaker_that_is_half_open_lets_one_through_and_closes_when_it_ends_well() -> None:
    breaker = Breaker(PAUSES)
    breaker.trip("gone", 0.0)
    breaker.probed(None, 1.0)
    assert breaker.limit(1.0) == 1
    assert breaker.reason == "gone"
    assert breaker.succeed()
    assert (breaker.limit(1.0), breaker.reason) == (None, None)
    breaker.trip("gone again", 2.0)
    assert breaker.is_due(3.0), "the pauses begin anew"


def test_breaker_that_fails_its_trial_opens_for_longer() -> None:
    breaker = Breaker(PAUSES)
    breaker.trip("full", 0.0)
    breaker.probed(None, 1.0)
    assert breaker.trip("full", 1.5)
    assert not breaker.is_due(3.4)
    assert breaker.is_due(3.5)


def test_breaker_closes_after_a_trial_time_as_tasks_may_take_hours_but_remembers() -> None:
    breaker = Breaker(PAUSES)
    breaker.trip("full", 0.0)
    breaker.probed(None, 1.0)
    assert breaker.limit(1.9) == 1
    assert breaker.limit(2.0) is None
    breaker.trip("full", 3.0)
    assert not breaker.is_due(4.9)


def test_outages_let_nothing_be_claimed_while_the_store_is_out_and_probe_it() -> None:
    answers = iter([OSError("no"), None])
    probed = threading.Semaphore(0)

    def probe() -> None:
        probed.release()
        error = next(answers)
        if error is not None:
            raise error

    outages = Outages(Pauses(first=0.01, longest=0.01), probe)
    assert (outages.room(0, 64), outages.reason()) == (64, None)
    outages.fault(Dependency.STORE, "no room")
    assert outages.room(0, 64) == 0
    assert outages.reason() == "store: no room"
    until(lambda: outages.room(5, 64) or outages.reason() == "store: OSError: no")
    until(lambda: outages.room(0, 64) == 64)
    assert outages.reason() is None
    assert probed.acquire(timeout=1)
    assert probed.acquire(timeout=1)
    assert not probed.acquire(blocking=False)


# What is shown


def note(name: str, state: OrchestratorState, reason: str | None = None) -> OrchestratorNote:
    """Return what an orchestrator says of itself."""
    return OrchestratorNote(name, "host", 1, state, reason, {"cpus": 2.0})


def test_a_job_waits_while_all_orchestrators_do(database: Database) -> None:
    with database.session() as session:
        assert waiting_reason(session) is None
        see_orchestrator(session, note("a", OrchestratorState.WAITING, "store: full"), first=True)
    with database.session() as session:
        assert waiting_reason(session) == "store: full"
        see_orchestrator(session, note("b", OrchestratorState.WORKING), first=True)
    with database.session() as session:
        assert waiting_reason(session) is None
        session.execute(text("UPDATE orchestrators SET seen_at = seen_at - :s WHERE id = 'b'"), {"s": GONE_SECONDS + 1})
    with database.session() as session:
        assert waiting_reason(session) == "store: full"
        rows = {row.note.id: row for row in list_orchestrators(session)}
    assert rows["b"].note.state is OrchestratorState.GONE
    assert rows["b"].silent_seconds > GONE_SECONDS
    assert rows["a"].note.cluster == {"cpus": 2.0}


# Jobs


def log_of(database: Database, job: str) -> list[tuple[str, dict[str, Any]]]:
    """Return what happened to a job and its tasks."""
    with database.session(read_only=True) as session:
        return [(each.event, dict(each.data)) for each in events(session, job, limit=10_000)]


def count(database: Database, job: str, name: str) -> int:
    """Return how often something happened."""
    return [event for event, _ in log_of(database, job)].count(name)


def faults(database: Database) -> int:
    """Return how many faults were counted."""
    with database.session(read_only=True) as session:
        return int(session.execute(text("SELECT sum(faults_task + faults_infrastructure) FROM tasks")).scalar_one())


class Drain:
    """`quantmill serve --drain` from the command line in this thread, and what is done to it from another."""

    def __init__(self, home: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words = ["--home", str(home), "--store", store]
        self.settings: Settings = resolve_settings({}, home=str(home), store_url=store)
        assert run_cli([*self.words, "init"]) == 0
        self.database = open_database(self.settings.database_url)
        # Tasks that ended at once would leave no time to take their store away.
        self.job = submit(self.database, graph(14))
        real = Scheduler.__init__

        def quick(self: Scheduler, database: Any, factory: Any, config: SchedulerConfig, *more: Any) -> None:
            real(self, database, factory, replace(config, pauses=QUICK), *more)

        monkeypatch.setattr(Scheduler, "__init__", quick)

    def run(self, disturb: Callable[[], None]) -> int:
        """Serve until the queue is empty; return the exit code."""
        failures: list[BaseException] = []

        def act() -> None:
            try:
                disturb()
            except BaseException as error:
                failures.append(error)
                # Else it would wait for what this thread was to bring back.
                while serving and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                    time.sleep(0.1)
                if serving:
                    os.kill(os.getpid(), signal.SIGTERM)

        serving = [True]
        thread = threading.Thread(target=act)
        thread.start()
        code = run_cli([*self.words, "serve", "--drain"])
        serving.clear()
        thread.join()
        for failure in failures:
            raise failure
        return code

    def finished(self) -> int:
        """Return how many tasks have finished."""
        return count(self.database, self.job, "finished")

    def waiting(self) -> str | None:
        """Return what the job waits for, as `jobs show` says."""
        with open_service(self.settings, need_store=False) as service:
            return show_job(service, self.job)["waiting"]


def check_outage(drain: Drain, words: str) -> None:
    """What must hold after any outage: nothing was lost, nothing counted, nobody is left."""
    with drain.database.session(read_only=True) as session:
        assert find_job(session, drain.job).state is JobState.SUCCEEDED
        assert list_orchestrators(session) == []
    assert faults(drain.database) == 0
    assert drain.finished() == 14
    released = [data["error"] for event, data in log_of(drain.database, drain.job) if event == "released"]
    assert released
    assert all(words in error for error in released)
    # While it was out nothing was claimed but trials after a probe that had passed.
    assert count(drain.database, drain.job, "claimed") == 14 + len(released)
    drain.database.close()


@pytest.mark.usefixtures("without_ray")
def test_job_waits_for_an_s3_server_that_is_stopped(
    home: Path, fragile_s3: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drain = Drain(home, "s3://blobs/x", monkeypatch)
    doctor: list[tuple[bool, str]] = []

    def disturb() -> None:
        until(lambda: drain.finished() >= 3)
        fragile_s3.stop()
        until(lambda: (drain.waiting() or "").startswith("store: "))
        # Longer than the longest pause between two probes.
        time.sleep(2.0)
        assert (drain.waiting() or "").startswith("store: ")
        doctor.append(_orchestrators(drain.settings))  # the other checks take long
        assert run_cli([*drain.words, "jobs", "ls"]) == 0
        assert run_cli([*drain.words, "jobs", "show", drain.job]) == 0
        fragile_s3.start()

    assert drain.run(disturb) == 0
    check_outage(drain, "127.0.0.1")
    ((ok, detail),) = doctor
    assert not ok
    assert " waiting for the store: " in detail
    out = capfd.readouterr().out
    assert f"{drain.job}  waiting " in out
    assert "waiting   store: s3://blobs/x" in out


class Threaded(InProcess):
    """An executor whose calls run in threads, so that those that wait for their store keep nobody else waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: SimpleQueue[Finished] = SimpleQueue()

    def submit(self, call: TaskCall) -> int:
        """Begin to run a call."""
        handle = next(self._handles)

        def run() -> None:
            self._ends.put(finished_of(handle, self.answer(call)))

        threading.Thread(target=run, daemon=True).start()
        return handle

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        with suppress(Empty):
            return [self._ends.get(timeout=timeout)]
        return []


def test_job_that_waits_for_an_s3_server_that_hangs_says_so_before_its_tasks_give_up(
    home: Path, fragile_s3: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They would for four minutes."""
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: Threaded())
    monkeypatch.setattr("orchestrator.scheduling.outages._QUIET_SECONDS", 0.5)
    monkeypatch.setitem(store_s3._QUICK_LIMITS, "read_timeout", 0.5)
    drain = Drain(home, "s3://blobs/x", monkeypatch)
    begun = [0.0, 0.0]

    def disturb() -> None:
        until(lambda: drain.finished() >= 3)
        with fragile_s3.standing_still():
            begun[0] = time.monotonic()
            until(lambda: (drain.waiting() or "").startswith("store: "))
            begun[1] = time.monotonic()
            assert run_cli([*drain.words, "jobs", "show", drain.job]) == 0

    assert drain.run(disturb) == 0
    assert begun[1] - begun[0] < store_s3._LIMITS["read_timeout"]
    assert "waiting   store: s3://blobs/x: got Read timeout" in capfd.readouterr().out
    assert faults(drain.database) == 0
    # Whoever waited for an answer got it, and nothing was done twice.
    assert (count(drain.database, drain.job, "claimed"), drain.finished()) == (14, 14)
    drain.database.close()


def test_outages_take_a_store_that_never_answers_for_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.scheduling.outages._QUIET_SECONDS", 0.01)
    monkeypatch.setattr("orchestrator.scheduling.outages._LATE_SECONDS", 0.1)
    answered = threading.Event()
    outages = Outages(Pauses(first=0.01, longest=0.01), answered.wait)
    until(lambda: outages.room(3, 64) == 0)
    assert outages.reason() == "store: got no answer within 0 s, wanted one"
    answered.set()
    until(lambda: outages.room(0, 64) == 64)
    assert outages.reason() is None


def test_outages_ask_a_store_again_before_they_take_it_for_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.scheduling.outages._QUIET_SECONDS", 0.01)
    asked: list[str] = []

    def probe() -> None:
        asked.append("")
        if len(asked) == 1:
            raise OSError("no")

    outages = Outages(QUICK, probe)
    until(lambda: outages.room(1, 64) and len(asked) > 2)
    assert outages.reason() is None
    assert outages.room(0, 64) == 64


@pytest.mark.usefixtures("without_ray")
def test_job_waits_for_a_full_folder_to_have_room(
    home: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = Drain(home, str(small_disk), monkeypatch)

    def disturb() -> None:
        until(lambda: drain.finished() >= 2)
        filler = fill(small_disk)
        until(drain.waiting)
        assert "disk full" in str(drain.waiting())
        time.sleep(1.0)
        assert drain.finished() < 14
        filler.unlink()

    assert drain.run(disturb) == 0
    check_outage(drain, "disk full")


class Held(InProcess):
    """An executor that runs calls at once and tells of their ends when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.calls = 0

    def submit(self, call: TaskCall) -> int:
        """Run a call."""
        self.calls += 1
        return super().submit(call)

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended, once it may."""
        if not self.go.wait(timeout):
            return []
        return super().wait(timeout)


@contextmanager
def served(scheduler: Scheduler, stop: threading.Event) -> Iterator[threading.Thread]:
    """Run a scheduler in a thread."""
    thread = threading.Thread(target=lambda: scheduler.run(stop=stop))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def config(tmp_path: Path) -> SchedulerConfig:
    """Settings with short times."""
    (tmp_path / "store").mkdir()
    return SchedulerConfig(
        str(tmp_path / "store"),
        tmp_path / "cache",
        lease_seconds=2.0,
        poll_seconds=0.1,
        patience_seconds=0.5,
        pauses=QUICK,
    )


@postgres_only
def test_a_database_that_was_there_is_waited_for_without_end(
    database: Database, database_url: str, postgres_url: str, config: SchedulerConfig
) -> None:
    executor = Held()
    executor.go.set()
    stop = threading.Event()
    with served(Scheduler(database, lambda: executor, config), stop) as thread:
        first = submit(database, graph(2))
        until(lambda: count(database, first, "succeeded"))
        with refused(database_url, postgres_url):
            # Six times its patience at the start.
            time.sleep(3.0)
            assert thread.is_alive()
        second = submit(database, graph(4))
        until(lambda: count(database, second, "succeeded"))
    assert faults(database) == 0


@postgres_only
def test_leases_outlast_a_database_that_was_stopped(
    database: Database, postgres_url: str, config: SchedulerConfig
) -> None:
    executor, other, stop = Held(), Held(), threading.Event()
    owners = [replace(config, owner=name) for name in ("one", "two")]
    with (
        served(Scheduler(database, lambda: executor, owners[0]), stop),
        served(Scheduler(database, lambda: other, owners[1]), stop),
    ):
        job = submit(database, graph(1))
        until(lambda: executor.calls + other.calls)
        with stopped_postgres(postgres_url):
            # Twice as long as a lease.
            time.sleep(4.0)
        executor.go.set()
        other.go.set()
        until(lambda: count(database, job, "succeeded"))
    happened = [event for event, _ in log_of(database, job)]
    assert [happened.count(name) for name in ("claimed", "expired", "finished")] == [1, 0, 1]
    assert executor.calls + other.calls == 1


@postgres_only
def test_jobs_wait_outlasts_a_restart_of_the_database(
    database: Database, database_url: str, postgres_url: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / "store").mkdir(parents=True)
    job = submit(database, graph(1))
    words = ["--home", str(home), "--db", database_url, "jobs"]

    def restart() -> None:
        time.sleep(1.0)
        with refused(database_url, postgres_url):
            time.sleep(2.5)
        run_cli([*words, "cancel", job])

    thread = threading.Thread(target=restart)
    thread.start()
    code = run_cli([*words, "wait", job])
    thread.join()
    assert code == 103
    assert "waiting for the database: " in capfd.readouterr().err
