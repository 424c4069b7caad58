"""An orchestrator that has nothing to do is woken by a new job, and does not have to ask for it."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest

from orchestrator.db.queries import add_model, create_job, enqueue_graph, find_job
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database
from orchestrator.graph import task_node
from orchestrator.scheduling import scheduler as module
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.scheduling.wakeup import Wakeup
from tests.orchestrator.in_process import InProcess


def submit(database: Database, *payloads: str) -> str:
    """Submit a job of tasks that do nothing."""
    digest = hashlib.sha256(b"model").hexdigest()
    nodes = [task_node("noop", {"payload": payload}, {}) for payload in payloads]
    with database.session() as session:
        model = add_model(session, ModelRow("model", digest, "Model", "here", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="recipe", recipe={}, recipe_digest=digest)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


def wait_for(database: Database, job: str) -> None:
    """Wait until a job has succeeded."""
    deadline = time.monotonic() + 60
    while True:
        with database.session(read_only=True) as session:
            if find_job(session, job).state == "succeeded":
                return
        assert time.monotonic() < deadline, "it did not end"
        time.sleep(0.02)


def test_an_idle_orchestrator_starts_a_new_job_without_asking(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After its first claim it would ask again in ten minutes.
    monkeypatch.setattr(module, "_SHORTEST_POLL_SECONDS", 600.0)
    (tmp_path / "store").mkdir()
    config = SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", poll_seconds=600.0)
    stop = threading.Event()
    scheduler = Scheduler(database, InProcess, config)
    serving = threading.Thread(target=scheduler.run, kwargs={"stop": stop})
    first = submit(database, "first")
    serving.start()
    try:
        wait_for(database, first)
        wait_for(database, submit(database, "second"))
    finally:
        stop.set()
        serving.join()


def test_wakeup_forgets_news_that_it_has_told(database: Database) -> None:
    wakeup = Wakeup(database)
    wakeup.start()
    try:
        deadline = time.monotonic() + 60
        while not wakeup.wait(0.1):
            assert time.monotonic() < deadline
            submit(database, f"job {time.monotonic()}")
        while wakeup.wait(0.3):
            assert time.monotonic() < deadline
    finally:
        wakeup.stop()
