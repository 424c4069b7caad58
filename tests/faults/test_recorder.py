"""The recorder sees what a queue does, and the harness finds one that breaks its rules."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db import job_ends
from orchestrator.db import queue as queue_module
from orchestrator.db.queries import cancel_job, fail_task, finish_task, reap_expired, release_task, renew_leases
from orchestrator.db.rows import Lease
from orchestrator.db.session import Database, open_database
from tests.faults.broken import whatever_the_time
from tests.faults.checker import figures, violations
from tests.faults.history import History, Request
from tests.faults.member import Hooked
from tests.faults.recorder import Recorder, install
from tests.faults.world import World
from tests.orchestrator.db.conftest import QueueDriver


@pytest.fixture
def watched(database_url: str) -> Iterator[tuple[QueueDriver, Recorder]]:
    """A queue that is watched, and who watches it."""
    install(database_url)
    database: Database = open_database(database_url)
    recorder = Recorder(database_url)
    yield QueueDriver(database), recorder
    recorder.close()
    database.close()


def history(recorder: Recorder, **more: Any) -> History:
    """Return what was recorded."""
    wanted = recorder.sets("job_tasks", "task_id", "job_id")
    sources = recorder.sources()
    return History(recorder.changes(), recorder.log(), sources, wanted, **more)


def publish(queue: QueueDriver, lease: Lease) -> None:
    """Finish the task that publishes."""
    with queue.database.session() as session:
        outputs = {"artifact": queue.digest("artifact")}
        assert finish_task(session, lease, outputs, {"artifact_bytes": 1, "metrics": {}}, 1.0)


def release_of(queue: QueueDriver) -> tuple[Any, Any]:
    """Return a task and the release that is made of it."""
    first = queue.node("first")
    return first, queue.node("last", first, kind="release")


def test_everything_that_a_queue_does_is_recorded(watched: tuple[QueueDriver, Recorder]) -> None:
    queue, recorder = watched
    first, last = release_of(queue)
    job = queue.submit([first, last], release="name")
    other = queue.submit([queue.node("unwanted")], priority=-1)
    database = queue.database
    for undo in (
        lambda session, lease: fail_task(session, lease, fault="infrastructure", error="lost"),
        lambda session, lease: release_task(session, lease),
    ):
        (task,) = queue.claim(1)
        with database.session() as session:
            assert renew_leases(session, [task.lease], 600)
        with database.session() as session:
            assert undo(session, task.lease)
    (task,) = queue.claim(1)
    queue.expire(task.lease)
    with database.session() as session:
        assert reap_expired(session) == [first.id]
    queue.finish(queue.claim(1)[0].lease)
    with database.session() as session:
        assert cancel_job(session, other)
    (task,) = queue.claim(1)
    publish(queue, task.lease)
    seen = history(recorder, requests=(Request("submit", job), Request("cancel", other)))
    counts = figures(seen)
    wanted = {"claimed": 5, "renewed": 3, "retried": 1, "released": 1, "expired": 1, "finished": 2, "releases": 1}
    assert {name: counts[name] for name in wanted} == wanted
    assert (counts["jobs_succeeded"], counts["jobs_cancelled"]) == (1, 1)
    assert violations(seen) == {}


def test_change_that_was_rolled_back_leaves_no_trace(watched: tuple[QueueDriver, Recorder]) -> None:
    queue, recorder = watched
    queue.submit([queue.node("first")])
    before = recorder.changes()

    def fail(stage: str) -> None:
        raise RuntimeError(stage)

    queue.database.commit_hook = fail
    with pytest.raises(RuntimeError, match="before"):
        queue.claim(1)
    queue.database.commit_hook = None
    assert recorder.changes() == before


def test_queue_that_takes_results_of_lost_leases_is_found_out(
    watched: tuple[QueueDriver, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, recorder = watched
    queue.submit([queue.node("first")])
    (task,) = queue.claim(1)
    queue.expire(task.lease)
    assert not queue.finish(task.lease)
    monkeypatch.setattr(queue_module, "_FINISH", whatever_the_time(queue_module._FINISH))
    assert queue.finish(task.lease)
    assert set(violations(history(recorder))) == {"leases_exclusive"}


def test_queue_that_says_a_job_is_cancelled_and_goes_on_is_found_out(
    watched: tuple[QueueDriver, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, recorder = watched
    job = queue.submit([queue.node("first")])
    monkeypatch.setattr(job_ends, "_drop_tasks", lambda session, jobs: None)
    with queue.database.session() as session:
        assert cancel_job(session, job)
    queue.finish(queue.claim(1)[0].lease)
    assert "cancel_wins" in violations(history(recorder, requests=(Request("cancel", job),)))


def test_release_that_is_changed_is_found_out(watched: tuple[QueueDriver, Recorder]) -> None:
    queue, recorder = watched
    first, last = release_of(queue)
    queue.submit([first, last], release="name")
    queue.finish(queue.take(first))
    publish(queue, queue.take(last))
    assert violations(history(recorder)) == {}
    queue.execute("UPDATE releases SET bytes = 7")
    assert set(violations(history(recorder))) == {"releases_immutable"}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_count_that_is_wrong_is_seen(watched: tuple[QueueDriver, Recorder], count: int) -> None:
    queue, recorder = watched
    sources = [queue.node(number) for number in range(3)]
    reader = queue.node("reader", *sources)
    queue.submit([*sources, reader])
    assert queue.finish(queue.take(sources[0]))
    assert recorder.miscounts() == []
    queue.execute("UPDATE tasks SET waiting = :count WHERE id = :id", count=count, id=reader.id)
    assert recorder.miscounts() == [f"task {reader.id[:12]}: waits for {count} tasks, 2 of what it reads are missing"]


def test_a_row_that_the_database_refuses_is_noted(database_url: str, tmp_path: Path) -> None:
    install(database_url)
    world = World(database_url, tmp_path, random.Random(0), schedulers=0)

    def refused(hooked: Hooked) -> None:
        with hooked.database.session() as session:
            session.execute(text("INSERT INTO kind_timings (kind) VALUES ('a')"))

    world.as_user(refused)
    world.users[0].join()
    logging.getLogger("orchestrator.scheduling").warning("trying again in %.1f s: %s", 0.5, "a check constraint")
    logging.getLogger("orchestrator.scheduling").warning("trying again in %.1f s: %s", 0.5, "no answer")
    world.close()
    assert len(world.refusals) == 2
    assert world.user_errors == []
