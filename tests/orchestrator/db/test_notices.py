"""News of something to claim reaches who listens, from other processes' commits, and from nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.notices import Listener
from orchestrator.db.queries import cancel_job, release_task, retry_job
from orchestrator.db.session import open_database
from orchestrator.errors import DatabaseError

Driver = Any  # the fixture's class lives in conftest.py


def submit(queue: Driver) -> None:
    queue.submit([queue.node("node")])


def retry(queue: Driver) -> None:
    job = queue.rows("SELECT id FROM jobs")[0]["id"]
    with queue.database.session() as session:
        retry_job(session, job)


def release(queue: Driver) -> None:
    task = queue.claim(1)[0]
    with queue.database.session() as session:
        assert release_task(session, task.lease)


def cancelled(queue: Driver) -> None:
    submit(queue)
    with queue.database.session() as session:
        cancel_job(session, queue.rows("SELECT id FROM jobs")[0]["id"])


@pytest.mark.parametrize(
    ("before", "news"),
    [(None, submit), (cancelled, retry), (submit, release)],
    ids=["submitted", "retried", "released"],
)
def test_listener_hears_of_what_can_be_claimed(
    queue: Driver, before: Callable[[Driver], None] | None, news: Callable[[Driver], None]
) -> None:
    if before is not None:
        before(queue)
    listener = Listener(open_database(queue.database.url))
    assert listener.wait(0.0) is False
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(listener.wait, 60.0)
        news(queue)
        started = time.monotonic()
        assert heard.result() is True
    assert time.monotonic() - started < 30
    listener.close()


def test_listener_hears_nothing_of_what_was_rolled_back(queue: Driver) -> None:
    listener = Listener(open_database(queue.database.url))
    listener.wait(0.0)
    queue.database.commit_hook = lambda stage: 1 // 0
    with pytest.raises(ZeroDivisionError):
        submit(queue)
    queue.database.commit_hook = None
    assert listener.wait(0.1) is False
    listener.close()


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_listener_goes_on_after_its_connection_was_lost(queue: Driver) -> None:
    listener = Listener(open_database(queue.database.url))
    listener.wait(0.0)
    with queue.database.session() as session:
        session.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN quantmill'"))
    with pytest.raises(DatabaseError):
        listener.wait(30.0)
    assert listener.wait(0.0) is False
    submit(queue)
    assert listener.wait(30.0) is True
    listener.close()
