"""What queue and scheduler add to a task: run tasks that do nothing, and see how long they take in all.

    python -m benchmarks.scheduler_overhead [--tasks 1000] [--cpus 2] [--postgres URL] [--before COMMIT-or-FOLDER]
        [--rounds 1] [--out FILE]

Prints one JSON document: for each database the milliseconds per task of tasks that are all ready at once ("wide"; the
last one reads the blob of the first), and of a chain, in which each reads the one before; beside each the CPU time of
the orchestrator's process alone, which other load on the machine changes least; `ok`: all are under 25 ms.
Starting Ray is not counted: the clock runs from the first task's claim to the last one's end. Without --postgres a
server is started from its wheel in a temporary folder. With --before, an older version does the same in turn with this
one, and `ratio` says how many times as many tasks a second this one runs; figures are medians of the rounds.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cli import give, parser
from benchmarks.queue_compare import ROOT, answer, checkout, machine, new_database, start
from benchmarks.queue_throughput import wheel_postgres
from orchestrator.db.queries import add_model, create_job, enqueue_graph
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database
from orchestrator.graph import TaskNode

LIMIT_MS = 25.0
SHAPES = ("wide", "chain")


def submit(database: Database, nodes: Sequence[TaskNode]) -> str:
    """Make a job of a graph whose last node is its target."""
    digest = hashlib.sha256(b"model").hexdigest()
    with database.session() as session:
        model = add_model(session, ModelRow("none", digest, "None", "nowhere", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="none", recipe={}, recipe_digest=digest)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


def measure(tree: Path, url: str, shape: str, tasks: int, cpus: int) -> dict[str, float]:
    """Return the milliseconds per task, from the first claim to the end of the job, and those of CPU time."""
    enqueued = answer(start(tree, "enqueue", url, str(tasks), shape))
    with tempfile.TemporaryDirectory(prefix="quantmill-overhead-") as folder:
        store = Path(folder, "store")
        store.mkdir()
        ran = answer(start(tree, "run", url, enqueued["job"], str(cpus), str(store)))
    return {"ms": 1000 * ran["seconds"] / tasks, "cpu_ms": 1000 * ran["cpu_seconds"] / tasks}


def measure_database(tree: Path, name: str, server: str, shape: str, number: int, options: Any) -> dict[str, float]:
    """Measure on a new database."""
    if name == "postgres":
        with new_database(server, f"overhead_{number}") as url:
            return measure(tree, url, shape, options.tasks, options.cpus)
    with tempfile.TemporaryDirectory(prefix="quantmill-overhead-") as folder:
        return measure(tree, f"sqlite:///{folder}/quantmill.db", shape, options.tasks, options.cpus)


def main() -> int:
    """Measure, print the figures, and return 1 if one of them is too large."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=1000)
    arguments.add_argument("--cpus", type=int, default=2)
    arguments.add_argument("--postgres", metavar="URL", help="a Postgres server; default: one from the wheel")
    arguments.add_argument("--before", metavar="COMMIT-or-FOLDER", help="an older version to compare with")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    report: dict[str, Any] = {"machine": machine(), "tasks": options.tasks, "cpus": options.cpus}
    runs: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmill-bench-")))
        server = options.postgres or stack.enter_context(wheel_postgres(folder / "postgres"))
        before = stack.enter_context(checkout(options.before))
        trees = {"after": ROOT} | ({"before": before} if before else {})
        cases = [(name, shape) for name in ("sqlite", "postgres") for shape in SHAPES] * options.rounds
        for number, (name, shape) in enumerate(cases):
            for which, tree in trees.items():
                figures = measure_database(tree, name, server, shape, 2 * number + (which == "before"), options)
                runs.setdefault((which, name, shape), []).append(figures)
    medians = {
        case: {key: round(statistics.median(run[key] for run in each), 2) for key in each[0]}
        for case, each in runs.items()
    }
    for which in trees:
        tables = {name: {shape: medians[which, name, shape] for shape in SHAPES} for name in ("sqlite", "postgres")}
        report |= tables if which == "after" else {"before": tables}
    if before:
        report["ratio"] = {
            f"{name} {shape}": round(medians["before", name, shape]["ms"] / medians["after", name, shape]["ms"], 2)
            for name in ("sqlite", "postgres")
            for shape in SHAPES
        }
    ok = all(figures["ms"] < LIMIT_MS for (which, _, _), figures in medians.items() if which == "after")
    give(report | {"limit_ms": LIMIT_MS, "ok": ok}, options.out)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
