"""A driver of the queue: every step is one transaction, as in real use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import inspect, text

from orchestrator.db.picking import Picker
from orchestrator.db.queries import (
    add_model,
    claim_tasks,
    create_job,
    enqueue_graph,
    fail_task,
    find_job,
    finish_task,
)
from orchestrator.db.rows import ClaimedTask, EnqueueCounts, JobRow, Lease, ModelRow
from orchestrator.db.session import Database, lock_graph
from orchestrator.graph import TaskNode, TaskRef, task_node


def digest(name: str) -> str:
    """Return a digest that stands for some bytes."""
    return hashlib.sha256(name.encode()).hexdigest()


class QueueDriver:
    """Submits graphs, works through them, and looks at what is left in the tables."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.digest = digest
        self.counts = EnqueueCounts(0, 0)

    def node(self, name: Any, *sources: TaskNode, kind: str = "noop", version: int = 1, **options: Any) -> TaskNode:
        """Make a task called `name` that reads the output "out" of its sources."""
        inputs: dict[str, list[str | TaskRef]] = {"data": [digest("data")]}
        if sources:
            inputs["sources"] = [TaskRef(source.id, "out") for source in sources]
        return task_node(kind, {"name": name}, inputs, version=version, label=str(name), **options)

    def submit(
        self,
        nodes: Sequence[TaskNode] | Iterable[TaskNode],
        target: TaskNode | None = None,
        *,
        priority: int = 0,
        release: str | None = None,
        owner: str = "",
    ) -> str:
        """Make a job of a graph whose last node is its target; `counts` then says what enqueueing returned."""
        if target is None:
            nodes = list(nodes)
            target = nodes[-1]
        with self.database.session() as session:
            model = add_model(session, ModelRow("model", digest("model"), "UNet2DModel", "here", 10, 5, {"units": []}))
            recipe = {"recipe_name": "recipe", "recipe": {"bits": 4}, "recipe_digest": digest("recipe")}
            job = create_job(session, model=model, release_name=release, priority=priority, owner=owner, **recipe)
            self.counts = enqueue_graph(session, job, nodes, target)
        return job

    def claim(self, limit: int = 1, *, lease_seconds: float = 60.0, picker: Picker | None = None) -> list[ClaimedTask]:
        """Claim tasks."""
        with self.database.session() as session:
            return claim_tasks(session, owner="test", limit=limit, lease_seconds=lease_seconds, picker=picker)

    def take(self, node: TaskNode, **options: Any) -> Lease:
        """Claim what is next, which must be this task; return the lease."""
        claimed = self.claim(1, **options)
        assert [task.lease.task_id for task in claimed] == [node.id]
        return claimed[0].lease

    def finish(
        self, lease: Lease, out: str | None = None, metrics: Mapping[str, Any] | None = None, seconds: float = 2.0
    ) -> bool:
        """Finish a task with an output called "out"."""
        outputs = {"out": digest(out or lease.task_id)}
        with self.database.session() as session:
            return finish_task(session, lease, outputs, metrics or {}, seconds)

    def fail(self, lease: Lease, fault: str = "task", error: str = "it broke") -> bool:
        """Fail a task."""
        with self.database.session() as session:
            return fail_task(session, lease, fault=fault, error=error)

    def work(self) -> list[str]:
        """Claim and finish until there is nothing to claim; return the labels in the order of work."""
        labels = []
        while claimed := self.claim(10):
            for task in claimed:
                assert self.finish(task.lease)
                labels.append(task.label)
        return labels

    def job(self, job: str) -> JobRow:
        """Look a job up."""
        with self.database.session(read_only=True) as session:
            return find_job(session, job)

    def task(self, node: TaskNode) -> dict[str, Any]:
        """Return a task's row."""
        return self.rows("SELECT * FROM tasks WHERE id = :id", id=node.id)[0]

    def states(self, *nodes: TaskNode) -> list[str]:
        """Return the states of tasks."""
        return [self.task(node)["state"] for node in nodes]

    def rows(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        """Run a query of the test's own."""
        with self.database.session(read_only=True) as session:
            return [dict(row) for row in session.execute(text(statement), values).mappings()]

    def execute(self, statement: str, **values: Any) -> None:
        """Change something behind the queue's back."""
        with self.database.session() as session:
            lock_graph(session)
            session.execute(text(statement), values)

    def expire(self, lease: Lease) -> None:
        """Let a lease run out."""
        self.execute("UPDATE tasks SET lease_until = 1 WHERE id = :id", id=lease.task_id)

    def skip_backoff(self) -> None:
        """Let the waits between attempts pass."""
        self.execute("UPDATE tasks SET not_before = 0")

    def snapshot(self) -> dict[str, list[str]]:
        """Return every row of every table."""
        tables = inspect(self.database.engine).get_table_names()
        return {table: sorted(map(repr, self.rows(f"SELECT * FROM {table}"))) for table in tables}


@pytest.fixture
def queue(database: Database) -> QueueDriver:
    """A driver of an empty queue; the test runs on SQLite and on Postgres."""
    return QueueDriver(database)
