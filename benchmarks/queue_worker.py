"""One process of a queue benchmark, on whatever Quantmill its PYTHONPATH names: this one, or an older checkout.

    python -P benchmarks/queue_worker.py enqueue URL TASKS SHAPE
    python -P benchmarks/queue_worker.py drain URL SECONDS BATCH HOW
    python -P benchmarks/queue_worker.py run URL JOB CPUS STORE

`enqueue` makes the schema and a job, `drain` waits for a line on standard input, then claims and finishes tasks, `run`
executes a job on a local Ray. Each prints one line of JSON. It uses only what older versions have too.

SHAPE: "rows" of 100 tasks that each read three of the row before, "wide" (all ready at once) or "chain". HOW: "each",
a transaction for each claim of BATCH tasks and for each finish, or "batch", one that finishes a batch and claims the
next, as the scheduler does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.db import queries
from orchestrator.db.rows import ClaimedTask, ModelRow
from orchestrator.db.session import Database, open_database, upgrade
from orchestrator.graph import TaskNode, TaskRef, task_node

ROW = 100


def digest(text: str) -> str:
    """Return a digest that stands for some bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def rows(tasks: int) -> Iterator[TaskNode]:
    """Plan rows of tasks that each read three of the row before, and one task that reads the last row."""
    before: list[TaskNode] = []
    row: list[TaskNode] = []
    for number in range(tasks - 1):
        column = number % ROW
        sources = [TaskRef(before[(column + step) % ROW].id, "blob") for step in range(3)] if before else []
        row.append(
            task_node("noop", {"payload": ["rows", number]}, {"before": sources}, work=0.1, label=f"unit {number}")
        )
        yield row[-1]
        if len(row) == ROW:
            before, row = row, []
    yield task_node("noop", {"payload": "end"}, {"all": [TaskRef(node.id, "blob") for node in row or before]})


def wide(tasks: int) -> Iterator[TaskNode]:
    """Plan tasks that are all ready at once, and one that reads the first."""
    first = None
    for number in range(tasks - 1):
        node = task_node("noop", {"payload": ["wide", number]}, {})
        first = first or node
        yield node
    assert first is not None
    yield task_node("noop", {"payload": "end"}, {"first": [TaskRef(first.id, "blob")]})


def chain(tasks: int) -> Iterator[TaskNode]:
    """Plan tasks that each read the one before."""
    last: list[str | TaskRef] = []
    for number in range(tasks):
        node = task_node("noop", {"payload": ["chain", number]}, {"before": last})
        last = [TaskRef(node.id, "blob")]
        yield node


SHAPES = {"rows": rows, "wide": wide, "chain": chain}


def enqueue(url: str, tasks: int, shape: str) -> dict[str, Any]:
    """Make the schema and a job; return the seconds to plan and enqueue it."""
    upgrade(url)
    database = open_database(url)
    nodes = list(SHAPES[shape](tasks))
    started, cpu = time.perf_counter(), time.process_time()
    with database.session() as session:
        model = queries.add_model(session, ModelRow("bench", digest("model"), "None", "bench", 1, 1, {}))
        job = queries.create_job(session, model=model, recipe_name="bench", recipe={}, recipe_digest=digest("recipe"))
        queries.enqueue_graph(session, job, nodes, nodes[-1])
    return {"job": job, "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


def drain(url: str, seconds: float, batch: int, how: str) -> dict[str, Any]:
    """Claim and finish tasks for so long, or until none is left; return how many and the seconds."""
    database = open_database(url)
    work = _batch if how == "batch" else _each
    claimed = _claim(database, 0)  # connects
    sys.stdin.readline()
    started = last = time.time()
    cpu, done, dry = time.process_time(), 0, 0
    while (claimed or dry < 20) and time.time() - started < seconds:
        finished, claimed = work(database, claimed, batch)
        done += finished
        if finished:
            last = time.time()
        dry = 0 if claimed else dry + 1
        if not claimed:
            time.sleep(0.005)
    if claimed:
        with database.session() as session:
            for task in claimed:
                queries.release_task(session, task.lease)
    return {"done": done, "started": started, "last": last, "cpu_seconds": time.process_time() - cpu}


def _claim(database: Database, limit: int) -> list[ClaimedTask]:
    with database.session() as session:
        return queries.claim_tasks(session, owner="bench", limit=limit, lease_seconds=60)


def _each(database: Database, claimed: list[ClaimedTask], batch: int) -> tuple[int, list[ClaimedTask]]:
    for task in claimed:
        with database.session() as session:
            assert queries.finish_task(session, task.lease, *_result(task))
    return len(claimed), _claim(database, batch)


def _batch(database: Database, claimed: list[ClaimedTask], batch: int) -> tuple[int, list[ClaimedTask]]:
    with database.session() as session:
        if hasattr(queries, "finish_tasks"):
            from orchestrator.db.rows import TaskEnd

            ends = [TaskEnd(task.lease, *_result(task)) for task in claimed]
            assert len(queries.finish_tasks(session, ends)) == len(claimed)
        else:
            for task in claimed:
                assert queries.finish_task(session, task.lease, *_result(task))
        return len(claimed), queries.claim_tasks(session, owner="bench", limit=batch, lease_seconds=60)


def _result(task: ClaimedTask) -> tuple[dict[str, str], dict[str, float], float]:
    return {"blob": digest(task.lease.task_id)}, {"error_db": 31.5}, 0.01


def run(url: str, job: str, cpus: int, store: str) -> dict[str, Any]:
    """Execute a job on a local Ray; return the seconds from its first claim to its end, and our own CPU seconds."""
    # Older versions have these elsewhere.
    is_old = importlib.util.find_spec("orchestrator.scheduler") is not None
    scheduling = importlib.import_module("orchestrator.scheduler" if is_old else "orchestrator.scheduling.scheduler")
    execution = importlib.import_module("workers.executor" if is_old else "workers.execution.executor")
    database = open_database(url)
    config = scheduling.SchedulerConfig(store_url=store, cache_dir=Path(store).parent / "cache")
    cpu = time.process_time()
    scheduling.Scheduler(database, lambda: execution.RayExecutor.start(cpus=cpus), config).run(until_job=job)
    cpu = time.process_time() - cpu
    with database.session(read_only=True) as session:
        row = queries.find_job(session, job)
    if row.state != "succeeded" or row.started_at is None or row.finished_at is None:
        raise SystemExit(f"job: got {row.state} ({row.error}), wanted it to succeed")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": row.finished_at - row.started_at,
        "cpu_seconds": cpu,
        "ray_cpu_seconds": children.ru_utime + children.ru_stime,
    }


def main(arguments: list[str]) -> None:
    """Do what the first argument says and print the figures."""
    command, url, *rest = arguments
    if command == "enqueue":
        figures = enqueue(url, int(rest[0]), rest[1])
    elif command == "drain":
        figures = drain(url, float(rest[0]), int(rest[1]), rest[2])
    else:
        figures = run(url, rest[0], int(rest[1]), rest[2])
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
