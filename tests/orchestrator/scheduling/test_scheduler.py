"""The scheduler on a real queue and a real Ray, with real faults."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from orchestrator.db.queries import (
    add_model,
    cancel_job,
    claim_tasks,
    create_job,
    enqueue_graph,
    events,
    find_job,
)
from orchestrator.db.rows import JobRow, ModelRow
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError
from orchestrator.graph import Resources, TaskNode, TaskRef, task_node
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig, stop_on_signals
from orchestrator.states import JobState
from quant_spec.tasks.noop import Params
from tests.processes import gone
from workers.execution.cluster import MEMORY_STEP
from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity, Executor, Finished, RayExecutor

pytestmark = pytest.mark.ray


class Borrowed:
    """A Ray that several tests use one after the other: its shutdown stops what is in flight, no more."""

    def __init__(self, ray: RayExecutor) -> None:
        self._ray = ray
        self._handles: set[int] = set()
        self.calls: list[TaskCall] = []

    def capacity(self) -> Capacity:
        """Return what there is."""
        return self._ray.capacity()

    def submit(self, call: TaskCall) -> int:
        """Start a call."""
        handle = self._ray.submit(call)
        self._handles.add(handle)
        self.calls.append(call)
        return handle

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        finished = self._ray.wait(timeout)
        self._handles -= {each.handle for each in finished}
        return finished

    def cancel(self, handle: int) -> None:
        """Stop a call."""
        self._ray.cancel(handle)

    def alive(self) -> bool:
        """Say whether it is there."""
        return self._ray.alive()

    def shutdown(self) -> None:
        """Stop what is in flight."""
        for handle in self._handles:
            self._ray.cancel(handle)
        deadline = time.monotonic() + 30
        while self._handles and time.monotonic() < deadline:
            self.wait(0.5)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[RayExecutor]:
    """A local Ray for all tests that do not harm it."""
    executor = RayExecutor.start(cpus=2)
    yield executor
    executor.shutdown()


@pytest.fixture
def borrowed(shared_ray: RayExecutor) -> Borrowed:
    """The shared Ray, for one test."""
    return Borrowed(shared_ray)


@pytest.fixture
def config(tmp_path: Path) -> SchedulerConfig:
    """Settings with short times."""
    (tmp_path / "store").mkdir()
    return SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", lease_seconds=2.0, poll_seconds=0.1)


def noop(name: Any, *sources: TaskNode, seconds: float = 0.0, **options: Any) -> TaskNode:
    """Plan a task that does nothing."""
    inputs = {"sources": [TaskRef(source.id, "blob") for source in sources]} if sources else {}
    params = Params(payload=name, seconds=seconds).to_json()
    return task_node("noop", params, inputs, label=str(name), **options)


def submit(
    database: Database, nodes: Sequence[TaskNode], priority: int = 0, asked: dict[str, Any] | None = None
) -> str:
    """Make a job of a graph whose last node is its target."""
    digest = hashlib.sha256(b"model").hexdigest()
    with database.session() as session:
        model = add_model(session, ModelRow("model", digest, "Model", "here", 0, 0, {}))
        recipe: dict[str, Any] = {"recipe_name": "recipe", "recipe": asked or {}, "recipe_digest": digest}
        job = create_job(session, model=model, priority=priority, **recipe)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


def job_row(database: Database, job: str) -> JobRow:
    """Look a job up."""
    with database.session(read_only=True) as session:
        return find_job(session, job)


def rows(database: Database, statement: str, **values: Any) -> list[dict[str, Any]]:
    """Run a query of the test's own."""
    with database.session(read_only=True) as session:
        return [dict(row) for row in session.execute(text(statement), values).mappings()]


def count_events(database: Database, job: str, name: str) -> dict[str, int]:
    """Return how often something happened to each of a job's tasks."""
    with database.session(read_only=True) as session:
        tasks = [each.task for each in events(session, job, limit=10_000) if each.event == name and each.task]
    return {task: tasks.count(task) for task in tasks}


def diamond(width: int, **options: Any) -> list[TaskNode]:
    """Plan a task, some that read it, and one that reads them all."""
    first = noop("first", **options)
    middle = [noop(number, first, **options) for number in range(width)]
    return [first, *middle, noop("last", *middle, **options)]


def in_thread(work: Callable[[], None]) -> threading.Thread:
    """Start something in a thread."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def state_of(database: Database, node: TaskNode) -> str:
    """Return a task's state."""
    return str(rows(database, "SELECT state FROM tasks WHERE id = :id", id=node.id)[0]["state"])


def test_graph_runs_to_its_end_each_task_once(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    nodes = diamond(20)
    job = submit(database, nodes)
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert count_events(database, job, "finished") == {node.id: 1 for node in nodes}
    assert count_events(database, job, "claimed") == {node.id: 1 for node in nodes}
    assert len(borrowed.calls) == 22
    told = {(call.store_url, call.cache_dir, call.cache_bytes) for call in borrowed.calls}
    assert told == {(config.store_url, str(config.cache_dir), config.cache_bytes)}


def test_resources_reach_the_executor(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    submit(database, [noop("two", resources=Resources(cpus=2.0, memory_bytes=12345))])
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    call = borrowed.calls[0]
    assert (call.cpus, call.gpus, call.memory_bytes, call.threads, call.device) == (2.0, 0.0, MEMORY_STEP, 2, "cpu")
    assert call.version == 1


def test_task_larger_than_the_cluster_runs_alone(
    database: Database, borrowed: Borrowed, config: SchedulerConfig
) -> None:
    huge = noop("huge", resources=Resources(cpus=500.0, memory_bytes=1 << 50))
    job = submit(database, [noop("small"), huge])
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    assert job_row(database, job).state == JobState.SUCCEEDED


def test_drain_of_an_empty_queue_starts_no_executor(database: Database, config: SchedulerConfig) -> None:
    def factory() -> Executor:
        raise AssertionError("an executor was started")

    Scheduler(database, factory, config).run(drain=True)


def test_first_in_the_queue_does_not_wait_behind_those_that_fit(
    database: Database, borrowed: Borrowed, config: SchedulerConfig
) -> None:
    small = [noop(number, seconds=0.1) for number in range(30)]
    job = submit(database, [*small, noop("last", *small)])
    wide = noop("wide", resources=Resources(cpus=2.0))
    thread = in_thread(lambda: Scheduler(database, lambda: borrowed, config).run(drain=True))
    until(lambda: count_events(database, job, "finished"))
    submit(database, [wide], priority=100)
    thread.join(300)
    assert not thread.is_alive()
    finished = rows(database, "SELECT task_id FROM events WHERE event IN ('created', 'finished') ORDER BY id")
    order = [each["task_id"] for each in finished]
    submitted = len(order) - order[::-1].index(None) - 1  # when the second job was made
    # What ran and what was queued behind it: two CPUs, two of each.
    assert order.index(wide.id) - submitted <= 1 + 2 * 2


def test_until_job_leaves_other_jobs(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    other = noop("other", seconds=300)
    other_job = submit(database, [other])
    job = submit(database, diamond(3), priority=5)
    Scheduler(database, lambda: borrowed, config).run(until_job=job)
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert job_row(database, other_job).state in (JobState.QUEUED, JobState.RUNNING)
    assert state_of(database, other) == "queued"


def test_stop_gives_tasks_back_at_no_cost(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    nodes = [noop(number, seconds=300) for number in range(3)]
    job = submit(database, [*nodes, noop("last", *nodes)])
    stop = threading.Event()
    scheduler = Scheduler(database, lambda: borrowed, config)
    thread = in_thread(lambda: scheduler.run(stop=stop))
    until(lambda: state_of(database, nodes[0]) == "running")
    stop.set()
    thread.join(300)
    assert not thread.is_alive()
    assert [state_of(database, node) for node in nodes] == ["queued"] * 3
    faults = rows(database, "SELECT sum(faults_task + faults_infrastructure) AS faults FROM tasks")
    assert int(faults[0]["faults"]) == 0
    assert len(count_events(database, job, "released")) == 3


def test_long_task_keeps_its_lease(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    node = noop("long", seconds=5.0)
    job = submit(database, [node])
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    assert count_events(database, job, "claimed") == {node.id: 1}
    assert count_events(database, job, "expired") == {}


def test_cancelled_job_stops_its_task(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    node = noop("long", seconds=300)
    job = submit(database, [node])
    thread = in_thread(lambda: Scheduler(database, lambda: borrowed, config).run(drain=True))
    until(lambda: state_of(database, node) == "running")
    with database.session() as session:
        cancel_job(session, job)
    thread.join(300)
    assert not thread.is_alive()
    assert job_row(database, job).state == JobState.CANCELLED
    until(lambda: not borrowed._handles or borrowed.wait(0.1))


def test_result_after_a_lost_lease_is_dropped(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    node = noop("short", seconds=1.0)
    job = submit(database, [node])
    stop = threading.Event()
    # Renewals are rarer than the task is long, so it ends before the loss of its lease is noticed.
    slow = SchedulerConfig(config.store_url, config.cache_dir, lease_seconds=60.0)
    thread = in_thread(lambda: Scheduler(database, lambda: borrowed, slow).run(stop=stop))
    until(lambda: state_of(database, node) == "running")
    with database.session() as session:
        session.execute(text("UPDATE tasks SET lease_token = 'another', attempt = attempt + 1"))
    until(lambda: borrowed.calls and not borrowed._handles)
    time.sleep(0.5)
    stop.set()
    thread.join(300)
    assert state_of(database, node) == "running"
    assert rows(database, "SELECT * FROM results") == []
    assert job_row(database, job).state == JobState.RUNNING


def test_lease_lost_to_another_stops_the_task(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    node = noop("long", seconds=300)
    submit(database, [node])
    stop = threading.Event()
    thread = in_thread(lambda: Scheduler(database, lambda: borrowed, config).run(stop=stop))
    until(lambda: borrowed._handles)
    with database.session() as session:
        session.execute(text("UPDATE tasks SET lease_token = 'another', lease_until = lease_until + 3600"))
    until(lambda: not borrowed._handles or borrowed.wait(0.0))
    stop.set()
    thread.join(300)
    assert state_of(database, node) == "running"


def test_tasks_of_a_dead_orchestrator_are_taken_over(
    database: Database, borrowed: Borrowed, config: SchedulerConfig
) -> None:
    nodes = diamond(2)
    job = submit(database, nodes)
    with database.session() as session:
        assert len(claim_tasks(session, owner="dead", limit=1, lease_seconds=0.5)) == 1
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert count_events(database, job, "expired") == {nodes[0].id: 1}


def test_invalid_task_fails_its_job_at_once(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    job = submit(database, [noop("odd", version=7)])
    Scheduler(database, lambda: borrowed, config).run(drain=True)
    row = job_row(database, job)
    assert row.state == JobState.FAILED
    assert "version 7" in str(row.error)
    assert len(borrowed.calls) == 1


def test_faulty_task_is_tried_three_times(database: Database, borrowed: Borrowed, config: SchedulerConfig) -> None:
    node = task_node("noop", {"seconds": 1e300}, {})  # more than a clock can count
    job = submit(database, [node])
    thread = in_thread(lambda: Scheduler(database, lambda: borrowed, config).run(drain=True))

    def skip_backoff() -> bool:
        with database.session() as session:
            session.execute(text("UPDATE tasks SET not_before = 0 WHERE state = 'queued'"))
        return job_row(database, job).state == JobState.FAILED

    until(skip_backoff)
    thread.join(300)
    assert len(borrowed.calls) == 3
    assert "OverflowError" in str(job_row(database, job).error)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_commit_that_fails_once_loses_nothing(
    database: Database, borrowed: Borrowed, config: SchedulerConfig, moment: str
) -> None:
    nodes = diamond(10)
    job = submit(database, nodes)
    commits = {"n": 0}

    def fail_some(at: str) -> None:
        if at == moment:
            commits["n"] += 1
            if commits["n"] % 7 == 3:
                raise DatabaseError("database: got a fault, wanted a commit")

    database.commit_hook = fail_some
    Scheduler(database, lambda: borrowed, config).run(until_job=job)
    database.commit_hook = None
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert count_events(database, job, "finished") == {node.id: 1 for node in nodes}


def test_database_that_stays_away_ends_the_scheduler(
    database: Database, borrowed: Borrowed, config: SchedulerConfig
) -> None:
    def fail(at: str) -> None:
        raise DatabaseError("database: got no answer, wanted one")

    submit(database, [noop("any")])
    impatient = SchedulerConfig(config.store_url, config.cache_dir, patience_seconds=0.5)
    database.commit_hook = fail
    with pytest.raises(DatabaseError, match="no answer"):
        Scheduler(database, lambda: borrowed, impatient).run(drain=True)
    database.commit_hook = None


@pytest.mark.parametrize(
    "backend", ["sqlite", pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.slow])], indirect=True
)
def test_lost_ray_is_replaced_and_the_job_finishes(database: Database, config: SchedulerConfig) -> None:
    nodes = [noop(number, seconds=0.5) for number in range(8)]
    job = submit(database, [*nodes, noop("last", *nodes)])
    started: list[RayExecutor] = []

    def start() -> RayExecutor:
        started.append(RayExecutor.start(cpus=2))
        return started[-1]

    # Leases that outlast a busy machine: what is counted below are the tasks that Ray lost.
    patient = replace(config, lease_seconds=120.0)
    thread = in_thread(lambda: Scheduler(database, start, patient).run(drain=True))
    until(lambda: count_events(database, job, "finished"))
    driver = psutil.Process(started[0]._process.pid)
    lost = [driver, *driver.children(recursive=True)]
    for process in lost:
        if process.name() in ("raylet", "gcs_server"):
            process.kill()
    thread.join(300)
    assert not thread.is_alive()
    assert len(started) == 2
    assert gone(lost)
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert set(count_events(database, job, "finished").values()) == {1}
    faults = rows(database, "SELECT sum(faults_task) AS own, sum(faults_infrastructure) AS lost FROM tasks")[0]
    assert int(faults["own"]) == 0
    assert 1 <= int(faults["lost"]) <= 4


@pytest.mark.slow
def test_two_schedulers_share_the_work(database: Database, config: SchedulerConfig) -> None:
    nodes = diamond(60, seconds=0.02)
    job = submit(database, nodes)
    owners = ("one", "two")
    schedulers = [
        Scheduler(
            database,
            lambda: RayExecutor.start(cpus=1),
            SchedulerConfig(config.store_url, config.cache_dir, owner=owner),
        )
        for owner in owners
    ]
    threads = [in_thread(lambda scheduler=scheduler: scheduler.run(drain=True)) for scheduler in schedulers]
    for thread in threads:
        thread.join(200)
    assert job_row(database, job).state == JobState.SUCCEEDED
    assert count_events(database, job, "finished") == {node.id: 1 for node in nodes}
    with database.session(read_only=True) as session:
        claims = [each.data["owner"] for each in events(session, job, limit=10_000) if each.event == "claimed"]
    assert set(claims) == set(owners)


def test_signals_set_the_event_and_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
