"""How a scheduler that drains the queue ends: never before what is being submitted, and never without saying why."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from orchestrator.db.queries import add_model, create_job, enqueue_graph, find_job
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database
from orchestrator.graph import TaskNode, task_node
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig, Served
from orchestrator.states import JobState
from tests.orchestrator.in_process import InProcess
from workers.execution.executor import Capacity


@pytest.fixture
def config(tmp_path: Path) -> SchedulerConfig:
    """Settings with short times."""
    (tmp_path / "store").mkdir()
    return SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", poll_seconds=0.1)


def register(session: Session) -> ModelRow:
    """Register a model to make jobs of."""
    return add_model(session, ModelRow("model", hashlib.sha256(b"m").hexdigest(), "Model", "here", 0, 0, {}))


def enqueue(session: Session, model: ModelRow, name: str) -> str:
    """Make a job of one task, in a transaction that goes on."""
    node: TaskNode = task_node("noop", {"payload": name}, {}, label=name)
    recipe: dict[str, Any] = {"recipe_name": "recipe", "recipe": {}, "recipe_digest": model.digest}
    job = create_job(session, model=model, **recipe)
    enqueue_graph(session, job, [node], node)
    return job


@pytest.fixture
def first_look(database: Database) -> Iterator[threading.Event]:
    """Set when another thread than the test's has asked the database for jobs for the first time."""
    looked, own = threading.Event(), threading.get_ident()

    def note(connection: Any, cursor: Any, statement: str, *others: Any) -> None:
        if threading.get_ident() != own and "FROM jobs" in statement:
            looked.set()

    event.listen(database.engine, "after_cursor_execute", note)
    yield looked
    event.remove(database.engine, "after_cursor_execute", note)


@pytest.mark.parametrize("begun", ["created", "enqueued"])
def test_a_job_that_is_being_submitted_is_not_missed(
    database: Database, config: SchedulerConfig, first_look: threading.Event, begun: str
) -> None:
    """The scheduler looks when the job's transaction has begun and not ended: it sees nothing, and must not leave."""
    served: list[Served] = []
    scheduler = Scheduler(database, InProcess, config)
    thread = threading.Thread(target=lambda: served.append(scheduler.run(drain=True)))
    with database.session() as session:
        model = register(session)
    with database.session() as session:
        node: TaskNode = task_node("noop", {"payload": begun}, {})
        recipe: dict[str, Any] = {"recipe_name": "recipe", "recipe": {}, "recipe_digest": model.digest}
        job = create_job(session, model=model, **recipe)
        if begun == "enqueued":
            enqueue_graph(session, job, [node], node)
        thread.start()
        assert first_look.wait(60)
        # One that does not wait for this transaction has ended by now.
        thread.join(0.5)
        assert thread.is_alive()
        if begun == "created":
            enqueue_graph(session, job, [node], node)
    thread.join(60)
    assert not thread.is_alive()
    with database.session(read_only=True) as session:
        assert find_job(session, job).state == JobState.SUCCEEDED
    assert served == [Served(stopped=False, found_work=True, executed=1)]


def test_a_cluster_that_has_no_capacity_yet_is_waited_for(
    database: Database, config: SchedulerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with database.session() as session:
        job = enqueue(session, register(session), "one")
    nothing = [Capacity(0.0, 0.0, 0)] * 8
    with caplog.at_level(logging.WARNING, "orchestrator"):
        served = Scheduler(database, lambda: InProcess(*nothing), config).run(drain=True)
    assert served == Served(stopped=False, found_work=True, executed=1)
    with database.session(read_only=True) as session:
        assert find_job(session, job).state == JobState.SUCCEEDED
    assert [record.message[:23] for record in caplog.records] == ["waiting for the cluster"]


def test_an_empty_queue_is_told_from_one_that_was_worked_off(database: Database, config: SchedulerConfig) -> None:
    assert Scheduler(database, InProcess, config).run(drain=True) == Served(False, False, 0)
    with database.session() as session:
        model = register(session)
        for name in ("one", "two", "one"):
            enqueue(session, model, name)
    assert Scheduler(database, InProcess, config).run(drain=True) == Served(False, True, 2)
    assert Scheduler(database, InProcess, config).run(drain=True) == Served(False, False, 0)


def test_a_scheduler_that_was_stopped_has_not_drained(database: Database, config: SchedulerConfig) -> None:
    stop = threading.Event()

    def start_slowly() -> InProcess:
        # A signal while the executor starts.
        stop.set()
        return InProcess()

    with database.session() as session:
        job = enqueue(session, register(session), "one")
    served = Scheduler(database, start_slowly, config).run(drain=True, stop=stop)
    assert served == Served(stopped=True, found_work=True, executed=0)
    with database.session(read_only=True) as session:
        assert find_job(session, job).state == JobState.QUEUED
