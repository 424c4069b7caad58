"""What tests of outages share: graphs of short tasks, and ways to take a Postgres server away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from orchestrator.db.queries import add_model, create_job, enqueue_graph
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database
from orchestrator.graph import TaskNode, TaskRef, task_node

postgres_only = pytest.mark.parametrize(
    "backend", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def graph(count: int, seconds: float = 0.05) -> list[TaskNode]:
    """Plan tasks that depend on one another, each with a blob of its own."""
    nodes: list[TaskNode] = []
    for number in range(count):
        sources = {"sources": [TaskRef(nodes[-1].id, "blob")]} if nodes else {}
        nodes.append(task_node("noop", {"payload": number, "seconds": seconds}, sources, label=str(number)))
    return nodes


def submit(database: Database, nodes: Sequence[TaskNode]) -> str:
    """Make a job of a graph whose last node is its target."""
    with database.session() as session:
        model = add_model(session, ModelRow("model", "0" * 64, "Model", "here", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="recipe", recipe={}, recipe_digest="0" * 64)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


@contextmanager
def refused(url: str, admin: str) -> Iterator[None]:
    """Let a Postgres database end its connections and take no others."""
    name = url.partition("?")[0].rsplit("/", 1)[1]
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")


@contextmanager
def stopped_postgres(admin: str) -> Iterator[None]:
    """Let every process of a Postgres server stand still: its connections stay, and nobody answers."""
    with psycopg.connect(admin, autocommit=True) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    parent = psutil.Process(postmaster(admin))
    processes = [parent]
    parent.suspend()
    try:
        for child in parent.children():
            child.suspend()
            processes.append(child)
        yield
    finally:
        for process in reversed(processes):
            process.resume()


def postmaster(admin: str) -> int:
    """Return the process that a Postgres server began with."""
    with psycopg.connect(admin, autocommit=True) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    assert row is not None
    return int((Path(row[0]) / "postmaster.pid").read_text().split()[0])
