"""What queue and scheduler add to a task: run tasks that do nothing, and see how long they take in all.

    python -m benchmarks.scheduler_overhead [--tasks 1000] [--cpus 2] [--postgres URL]

Prints one JSON document: for each database the milliseconds per task of tasks that are all ready at once ("wide"; the
last one reads the blobs of all others), and of a chain, in which each reads the one before; beside each the CPU time of
this process alone, which other load on the machine does not change; `ok`: all are under 25 ms.
Starting Ray is not counted: the clock runs from the first task's claim to the last one's end. Without --postgres a
server is started from its wheel in a temporary folder.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import give, parser
from benchmarks.queue_throughput import databases
from orchestrator.db.queries import add_model, create_job, enqueue_graph, find_job
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database, open_database
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.states import JobState
from workers.execution.executor import RayExecutor

LIMIT_MS = 25.0


def wide(tasks: int) -> list[TaskNode]:
    """Plan tasks that are all ready at once, and one that reads them all."""
    nodes = [task_node("noop", {"payload": ["wide", number]}, {}) for number in range(tasks - 1)]
    return [*nodes, task_node("noop", {"payload": "end"}, {"all": [TaskRef(node.id, "blob") for node in nodes]})]


def chain(tasks: int) -> list[TaskNode]:
    """Plan tasks that each read the one before."""
    nodes: list[TaskNode] = []
    for number in range(tasks):
        before = [TaskRef(nodes[-1].id, "blob")] if nodes else []
        nodes.append(task_node("noop", {"payload": ["chain", number]}, {"before": before}))
    return nodes


def submit(database: Database, nodes: Sequence[TaskNode]) -> str:
    """Make a job of a graph whose last node is its target."""
    digest = hashlib.sha256(b"model").hexdigest()
    with database.session() as session:
        model = add_model(session, ModelRow("none", digest, "None", "nowhere", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="none", recipe={}, recipe_digest=digest)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


def measure(url: str, nodes: Sequence[TaskNode], cpus: int) -> dict[str, float]:
    """Return the milliseconds per task, from the first claim to the end of the job, and those of our own CPU time."""
    database = open_database(url)
    job = submit(database, nodes)
    with tempfile.TemporaryDirectory(prefix="quantmill-overhead-") as folder:
        store = Path(folder, "store")
        store.mkdir()
        config = SchedulerConfig(store_url=str(store), cache_dir=Path(folder, "cache"))
        started = time.process_time()
        Scheduler(database, lambda: RayExecutor.start(cpus=cpus), config).run(until_job=job)
        cpu = time.process_time() - started
    with database.session(read_only=True) as session:
        row = find_job(session, job)
    database.close()
    if row.state != JobState.SUCCEEDED or row.started_at is None or row.finished_at is None:
        raise SystemExit(f"job: got {row.state} ({row.error}), wanted it to succeed")
    seconds = row.finished_at - row.started_at
    return {"ms": round(seconds / len(nodes) * 1000, 2), "cpu_ms": round(cpu / len(nodes) * 1000, 2)}


def main() -> int:
    """Measure, print the figures, and return 1 if one of them is too large."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=1000)
    arguments.add_argument("--cpus", type=int, default=2)
    arguments.add_argument("--postgres", metavar="URL", help="an empty Postgres database; default: one from the wheel")
    options = arguments.parse_args()
    with databases(options.postgres) as urls:
        figures = {}
        for name, url in urls.items():
            figures[name] = {
                "wide": measure(url, wide(options.tasks), options.cpus),
                "chain": measure(url, chain(options.tasks), options.cpus),
            }
    ok = all(shape["ms"] < LIMIT_MS for each in figures.values() for shape in each.values())
    report = {"tasks": options.tasks, "cpus": options.cpus, **figures, "limit_ms": LIMIT_MS, "ok": ok}
    give(report)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
