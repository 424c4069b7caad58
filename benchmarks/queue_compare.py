"""The queue beside an older Quantmill's and beside other queues: tasks claimed and finished a second on one Postgres.

    python -m benchmarks.queue_compare [--before COMMIT-or-FOLDER] [--tasks 3000] [--seconds 4] [--rounds 2]
        [--processes 1 2 4] [--others] [--out FILE]

Every measurement is a new database on one server from its wheel, with its default settings (fsync on), of a job of rows
of 100 tasks that each read three of the row before; processes drain it for some seconds. This tree and the older one
take turns, so that other load on the machine meets both. `batch`: one transaction finishes up to eight tasks and claims
the next, as the scheduler does; `each`, with most processes only: one for every finish. Prints one JSON document: tasks
a second, milliseconds of the processes' own CPU a task, seconds to enqueue, and ratios of medians. `--others` adds
procrastinate and pgqueuer, where they are installed, on jobs that do nothing.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.cli import give, parser
from benchmarks.queue_throughput import wheel_postgres

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "queue_worker.py"
OTHERS = ROOT / "benchmarks" / "other_queues.py"
BATCH = 8


@contextmanager
def checkout(version: str | None) -> Iterator[Path | None]:
    """Give the folder of an older version: as it is, or a commit of this repository, taken out for the time."""
    if version is None or Path(version).is_dir():
        yield None if version is None else Path(version).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="quantmill-before-") as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", version], check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], check=True, input=archive)
        yield Path(folder)


def machine() -> str:
    """Describe the machine in a line."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    load = f"{os.getloadavg()[0]:.1f}"
    return f"{os.cpu_count()} CPUs of {model.partition(':')[2].strip() or platform.machine()}, load {load} at the start"


def start(tree: Path, *arguments: str, script: Path = WORKER) -> subprocess.Popen[str]:
    """Start a process on a tree's code."""
    search = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-P", str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """Return what a process printed once it has ended."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{WORKER.name}: got exit status {process.returncode} of {process.args!r}")
    return json.loads(out)


@contextmanager
def new_database(server: str, name: str) -> Iterator[str]:
    """Give the URL of an empty database."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def drain(tree: Path, url: str, processes: int, seconds: float, how: str) -> dict[str, float]:
    """Let processes drain a database together; return tasks a second and CPU milliseconds a task."""
    workers = [start(tree, "drain", url, str(seconds), str(BATCH), how) for _ in range(processes)]
    return gather(workers)


def gather(workers: list[subprocess.Popen[str]]) -> dict[str, float]:
    """Let waiting workers go and add up what they did."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [answer(worker) for worker in workers]
    done = sum(each["done"] for each in answers)
    took = max(each["last"] for each in answers) - min(each["started"] for each in answers)
    cpu = sum(each["cpu_seconds"] for each in answers)
    return {"tasks_per_second": done / took, "cpu_ms": 1000 * cpu / max(done, 1)}


def measure(tree: Path, server: str, number: int, options: Any, processes: int, how: str) -> dict[str, float]:
    """Enqueue a job in a new database and drain it."""
    with new_database(server, f"bench_{number}") as url:
        enqueued = answer(start(tree, "enqueue", url, str(options.tasks), "rows"))
        return {"enqueue_seconds": enqueued["seconds"]} | drain(tree, url, processes, options.seconds, how)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the medians of figures."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def compare(options: Any, before: Path | None, server: str) -> dict[str, Any]:
    """Measure both trees in turn; return figures by tree, way and number of processes, and ratios."""
    trees = {"after": ROOT} | ({"before": before} if before else {})
    cases = [*(("batch", count) for count in options.processes), ("each", max(options.processes))]
    runs: dict[str, list[dict[str, float]]] = {}
    number = 0
    for _ in range(options.rounds):
        for how, count in cases:
            for name, tree in trees.items():
                number += 1
                runs.setdefault(f"{name} {how} {count}", []).append(measure(tree, server, number, options, count, how))
    figures: dict[str, Any] = {name: medians(each) for name, each in runs.items()}
    most, least = max(options.processes), min(options.processes)
    rates = [_rate(figures, f"after batch {count}") for count in (most, least)]
    figures["more_processes"] = round(rates[0] / rates[1], 2)
    if before:
        figures["ratio"] = {
            f"{how} {count}": round(_rate(figures, f"after {how} {count}") / _rate(figures, f"before {how} {count}"), 2)
            for how, count in cases
        }
        enqueue = [statistics.median(run["enqueue_seconds"] for name, each in runs.items() if name.startswith(which)
                                     for run in each) for which in ("before", "after")]  # fmt: skip
        figures["enqueue_ratio"] = round(enqueue[0] / enqueue[1], 2)
    return figures


def _rate(figures: dict[str, Any], name: str) -> float:
    rate: float = figures[name]["tasks_per_second"]
    return rate


def others(options: Any, server: str) -> dict[str, Any]:
    """Measure other queues, where they are installed."""
    figures: dict[str, Any] = {}
    for name in ("procrastinate", "pgqueuer"):
        for count in options.processes:
            with new_database(server, f"{name}_{count}") as url:
                answer(start(ROOT, name, "enqueue", url, str(options.tasks), script=OTHERS))
                workers = [start(ROOT, name, "drain", url, str(options.seconds), script=OTHERS) for _ in range(count)]
                figures[f"{name} {count}"] = {key: round(value, 3) for key, value in gather(workers).items()}
    return figures


def main() -> None:
    """Measure and print the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--before", metavar="COMMIT-or-FOLDER", help="an older version to compare with")
    arguments.add_argument("--tasks", type=int, default=3000, help="size of the graph")
    arguments.add_argument("--seconds", type=float, default=4.0, help="how long each measurement drains")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments.add_argument("--others", action="store_true", help="also procrastinate and pgqueuer")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    report: dict[str, Any] = {"machine": machine(), "tasks": options.tasks, "batch": BATCH}
    with (
        tempfile.TemporaryDirectory(prefix="quantmill-bench-") as folder,
        checkout(options.before) as before,
        wheel_postgres(Path(folder, "postgres")) as server,
    ):
        report |= compare(options, before, server)
        if options.others:
            report["others"] = others(options, server)
    give(report, options.out)


if __name__ == "__main__":
    main()
