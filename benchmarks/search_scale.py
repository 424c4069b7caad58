"""A search's worth of tasks: planned, enqueued, run through Ray and recorded, with bodies that do nothing.

    python -m benchmarks.search_scale [--tasks 100000] [--workers 8] [--shapes flat jobs] [--databases sqlite postgres]
        [--finished 0] [--before COMMIT-or-FOLDER] [--before-tasks 600] [--out FILE] [--add]

Shapes: "flat", one job in which of every 50 tasks 49 are ready at once and one reads them; "jobs", one job for every 50
tasks, of which each job shares 40 with others, as candidates of a search do (groups of ten jobs have the same 40), so
that `--tasks` counts what the jobs have and fewer are run. Each case is a new database and a new Ray of so many
logical CPUs.

Prints one JSON document, and writes it after every case to `--out`. Of each case: seconds to plan and enqueue, tasks
run a second from the first claim to the last end (`run_rate`) and with planning and enqueueing (`rate`); CPU
milliseconds a task of the orchestrator, of Ray's driver, of Ray's other processes, of the tasks' workers, and, while
they run, of Postgres' processes; the orchestrator's memory through the run; bytes of the database a task. `--finished`
fills the tables with so many finished tasks before (give several to compare). `--before` measures an older version
with `benchmarks.queue_worker` in the same run: `--before-tasks` tasks that are all ready at once, on two logical CPUs
as in its own benchmark; `ratio` is `rate` by that.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text

from benchmarks.cli import give, keep, parser
from benchmarks.queue_compare import ROOT, checkout, machine, new_database
from benchmarks.queue_throughput import wheel_postgres
from benchmarks.scheduler_overhead import measure as measure_before
from benchmarks.scheduler_overhead import submit
from orchestrator.db.session import Database, open_database, upgrade
from orchestrator.db.sql import POSTGRES
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from quant_spec.tasks.noop import BLOB
from workers.execution.executor import RayExecutor

JOB_TASKS, SHARED_TASKS, JOBS_A_GROUP = 50, 40, 10
_SERIES = {
    "sqlite": "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < :count) SELECT n FROM s) AS s",
    POSTGRES: "generate_series(1, :count) AS s(n)",
}
_HISTORY = (
    """
    INSERT INTO tasks (id, kind, version, params, inputs, cpus, gpus, memory_bytes, work, label, state, waiting, key,
                       priority, not_before, attempt, faults_task, faults_infrastructure, finished_at, needs)
    SELECT 'old-' || n, 'noop', 1, '{{}}', '{{}}', 1, 0, 0, 0, '', 'succeeded', 0, 'key-' || n, 0, 0, 1, 0, 0, 1, ''
    FROM {series}
    """,
    """
    INSERT INTO results (key, kind, outputs, metrics, seconds, created_at)
    SELECT 'key-' || n, 'noop', '{{}}', '{{}}', 0.001, 1 FROM {series}
    """,
    """
    INSERT INTO events (task_id, attempt, at, event, data) SELECT 'old-' || n, 1, 1, 'finished', '{{}}' FROM {series}
    """,
)
_REST = {"sqlite": ("ANALYZE",), POSTGRES: ("VACUUM (ANALYZE)", "CHECKPOINT")}


def flat(tasks: int) -> Iterator[list[TaskNode]]:
    """Plan one job: of every 50 tasks one reads the 49 others, and the job's last one reads those."""
    nodes: list[TaskNode] = []
    for number in range(tasks // JOB_TASKS):
        nodes += _with_reader([_leaf("flat", number, each) for each in range(JOB_TASKS - 1)])
    yield [*nodes, _reader(nodes[JOB_TASKS - 1 :: JOB_TASKS])]


def jobs(tasks: int) -> Iterator[list[TaskNode]]:
    """Plan jobs of 50 tasks, one of which reads the 49 others; groups of ten jobs share 40."""
    for number in range(tasks // JOB_TASKS):
        shared = [_leaf("shared", number // JOBS_A_GROUP, each) for each in range(SHARED_TASKS)]
        own = [_leaf("own", number, each) for each in range(JOB_TASKS - 1 - SHARED_TASKS)]
        yield _with_reader(shared + own)


def _leaf(*payload: Any) -> TaskNode:
    return task_node("noop", {"payload": payload}, {})


def _reader(nodes: Sequence[TaskNode]) -> TaskNode:
    return task_node("noop", {"payload": "last"}, {"all": [TaskRef(node.id, BLOB) for node in nodes]})


def _with_reader(nodes: list[TaskNode]) -> list[TaskNode]:
    return [*nodes, _reader(nodes)]


SHAPES = {"flat": flat, "jobs": jobs}


def fill(database: Database, finished: int) -> None:
    """Put finished tasks into the tables, with their results and an event each, and let the database come to rest."""
    with database.session() as session:
        dialect = session.get_bind().dialect.name
        series = _SERIES[dialect]
        for statement in _HISTORY:
            session.execute(text(statement.format(series=series)), {"count": finished})
    # What a server does by and by after a million rows were written at once would else be measured with the tasks.
    for statement in _REST[dialect]:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))


class Usage:
    """CPU seconds of this process, of those below it, and of a database's on this machine; memory of this one."""

    def __init__(self, every: float, database: str) -> None:
        """Look so often, in seconds; `database` is the name of one of Postgres."""
        self._every, self._own, self._database = every, psutil.Process(), database
        self._cpu: dict[tuple[str, int], float] = {}
        self._before: dict[tuple[str, int], float] = {}
        self.memory_mb: list[float] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextmanager
    def watched(self) -> Iterator[Usage]:
        """Watch while the block runs."""
        begun = self._own.cpu_times()
        self._look()
        self._before = dict(self._cpu)
        self._thread.start()
        yield self
        self._ending.set()
        self._thread.join()
        self._look()
        ended = self._own.cpu_times()
        self._cpu["orchestrator", 0] = ended.user + ended.system - begun.user - begun.system

    def _watch(self) -> None:
        while not self._ending.wait(self._every):
            self._look()

    def _look(self) -> None:
        self.memory_mb.append(self._own.memory_info().rss / 1e6)
        for child in self._own.children():
            self._note("ray driver", child)
            for process in child.children(recursive=True):
                self._note("ray", process)
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "postgres" and f" {self._database} " in " ".join(process.info["cmdline"] or ()):
                self._note("postgres", process)

    def _note(self, what: str, process: psutil.Process) -> None:
        try:
            times, name = process.cpu_times(), process.name()
        except psutil.Error:
            return
        self._cpu["workers" if name.startswith("ray::") and "Agent" not in name else what, process.pid] = (
            times.user + times.system
        )

    def cpu_ms(self, tasks: int) -> dict[str, float]:
        """Return CPU milliseconds a task."""
        sums: dict[str, float] = {}
        for (what, process), seconds in self._cpu.items():
            sums[what] = sums.get(what, 0.0) + seconds - self._before.get((what, process), 0.0)
        return {what: round(1000 * seconds / tasks, 3) for what, seconds in sorted(sums.items())}

    def memory(self) -> dict[str, Any]:
        """Return megabytes: the most, and the median of each tenth of the time."""
        size = max(1, len(self.memory_mb) // 10)
        tenths = [self.memory_mb[start : start + size] for start in range(0, len(self.memory_mb), size)]
        return {
            "rss_mb_most": round(max(self.memory_mb), 1),
            "rss_mb_over_time": [round(statistics.median(tenth), 1) for tenth in tenths if tenth],
        }


def run_case(url: str, shape: str, tasks: int, workers: int, finished: int) -> dict[str, Any]:
    """Plan, enqueue and run in this process; return the figures."""
    upgrade(url)
    database = open_database(url)
    if finished:
        fill(database, finished)
    begun = time.perf_counter()
    planned = 0
    for nodes in SHAPES[shape](tasks):
        submit(database, nodes)
        planned += len(nodes)
    enqueue_seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory(prefix="quantmill-scale-") as folder:
        store = Path(folder, "store")
        store.mkdir()
        config = SchedulerConfig(store_url=str(store), cache_dir=Path(folder, "cache"))
        scheduler = Scheduler(database, lambda: RayExecutor.start(cpus=workers), config)
        with Usage(max(0.2, tasks / 50_000), str(database.location.database)).watched() as usage:
            served = scheduler.run(drain=True)
    with database.session(read_only=True) as session:
        recent = "FROM tasks WHERE kind = 'noop' AND id NOT LIKE 'old-%'"
        counts = session.execute(text(f"SELECT state, count(*) AS tasks {recent} GROUP BY state"))
        states = {row.state: row.tasks for row in counts}
        started, ended = session.execute(text(f"SELECT min(started_at), max(finished_at) {recent}")).one()
        left = session.scalar(text("SELECT count(*) FROM jobs WHERE state <> 'succeeded'"))
        size = session.scalar(text("SELECT pg_database_size(current_database())")) if "postgres" in url else None
    run = sum(states.values())
    if states != {"succeeded": run} or served.executed != run or left:
        raise SystemExit(f"got {states}, {served.executed} run here, {left} jobs left; wanted all to succeed, once")
    database.close()
    if size is None:
        size = Path(url.removeprefix("sqlite:///")).stat().st_size
    return {
        "tasks_of_jobs": planned,
        "tasks_run": run,
        "finished_before": finished,
        "enqueue_seconds": round(enqueue_seconds, 2),
        "enqueue_rate": round(planned / enqueue_seconds, 1),
        "run_seconds": round(ended - started, 2),
        "run_rate": round(run / (ended - started), 1),
        "rate": round(planned / (enqueue_seconds + ended - started), 1),
        "cpu_ms_a_task": usage.cpu_ms(run),
        "database_bytes_a_task": round(size / (run + finished)),
        **usage.memory(),
    }


@contextmanager
def database_url(name: str, server: str, number: int) -> Iterator[str]:
    """Give the URL of a new database."""
    if name == "postgres":
        with new_database(server, f"scale_{number}") as url:
            yield url
        return
    with tempfile.TemporaryDirectory(prefix="quantmill-scale-") as folder:
        yield f"sqlite:///{folder}/quantmill.db"


def case_in_process(url: str, *arguments: object) -> dict[str, Any]:
    """Run a case in a process of its own, whose memory is the orchestrator's alone."""
    command = [sys.executable, "-m", "benchmarks.search_scale", "--case", url, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_all(options: Any) -> Iterator[dict[str, Any]]:
    """Measure case after case, after an older version on the same database and machine."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmill-bench-")))
        server = stack.enter_context(wheel_postgres(folder / "postgres"))
        before = stack.enter_context(checkout(options.before))
        number = 0
        for name in options.databases:
            rate = None
            if before is not None:
                number += 1
                with database_url(name, server, number) as url:
                    rate = 1000 / measure_before(before, url, "wide", options.before_tasks, 2)["ms"]
            for shape in options.shapes:
                for finished in options.finished:
                    number += 1
                    about = {"database": name, "shape": shape, "machine": machine(), "workers": options.workers}
                    with database_url(name, server, number) as url:
                        case = case_in_process(url, shape, options.tasks, options.workers, finished)
                    if rate is not None:
                        case |= {"before_rate": round(rate, 1), "ratio": round(case["rate"] / rate, 2)}
                    yield about | case


def main(arguments: Sequence[str]) -> None:
    """Measure, and give the figures."""
    if arguments[:1] == ["--case"]:
        url, shape, tasks, workers, finished = arguments[1:]
        sys.stdout.write(json.dumps(run_case(url, shape, int(tasks), int(workers), int(finished))) + "\n")
        return
    options_of = parser(__doc__)
    options_of.add_argument("--tasks", type=int, default=100_000)
    options_of.add_argument("--workers", type=int, default=8)
    options_of.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options_of.add_argument("--databases", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    options_of.add_argument("--finished", type=int, nargs="+", default=[0])
    options_of.add_argument("--before", metavar="COMMIT-or-FOLDER", help="an older version to compare with")
    options_of.add_argument("--before-tasks", type=int, default=600)
    options_of.add_argument("--out", type=Path)
    options_of.add_argument("--add", action="store_true", help="keep the cases that the file has")
    options = options_of.parse_args(arguments)
    report: dict[str, Any] = {"cases": []}
    for case in measure_all(options):
        if options.out and options.out.exists() and (options.add or report["cases"]):
            # Others may have added theirs meanwhile.
            report = json.loads(options.out.read_text())
        report["cases"].append(case)
        if options.out:
            keep(report, options.out)
    give(report)


if __name__ == "__main__":
    main(sys.argv[1:])
