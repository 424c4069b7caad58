"""How soon the queue answers: claims with much in front and behind, a ready task's start, idle time between tasks.

    python -m benchmarks.scheduler_latency [--finished 1000000] [--in-front 50000] [--claims 200] [--starts 40]
        [--unit-seconds 0.2] [--units 32] [--out FILE]

Prints one JSON document, on Postgres from its wheel with its default settings:

* `claim_ms`: medians and 99th percentiles of claims of one task, each committed, with so many finished tasks in the
  table and so many queued ones in front, of eight needs, that ask for more than there is;
* `start_ms`: from the commit of a job to its only task's claim by an orchestrator that has a cluster and nothing to do,
  and to the beginning of its body in a Ray worker;
* `scaling`: units of one model, which sleep, on 2, 4 and 8 logical CPUs: the share of the time that these were in use.

`wanted` are the limits of these figures (milliseconds at most, share at least), and `ok` says whether all are kept.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.cli import give, parser
from benchmarks.queue_compare import machine
from benchmarks.queue_throughput import wheel_postgres
from benchmarks.scheduler_overhead import submit
from orchestrator.db.queries import claim_tasks, find_job
from orchestrator.db.session import Database, lock_graph, open_database, upgrade
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.scheduling.picker import Places
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from quant_spec.tasks.noop import Params
from workers.execution.cluster import Node
from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity, Finished, RayExecutor

_HISTORY = """
    INSERT INTO tasks (id, kind, version, params, inputs, cpus, gpus, memory_bytes, work, label, state, waiting, key,
                       priority, not_before, attempt, faults_task, faults_infrastructure, finished_at)
    SELECT 'old-' || n, 'noop', 1, '{}', '{}', 1, 0, 0, 0, '', 'succeeded', 0, 'key-' || n, 0, 0, 1, 0, 0, 1
    FROM generate_series(1, :count) AS n
"""
_IN_FRONT = """
    INSERT INTO tasks (id, kind, version, params, inputs, cpus, gpus, memory_bytes, work, label, state, waiting, key,
                       priority, not_before, attempt, faults_task, faults_infrastructure, needs)
    SELECT 'big-' || n, 'noop', 1, '{}', '{}', 1, 1, n % 8, 0, '', 'queued', 0, 'big-' || n, 9, 0, 0, 0, 0,
           '1.0/1.0/' || n % 8 || '/0/cuda/None'
    FROM generate_series(1, :count) AS n
"""


#: The most milliseconds of a claim (99th percentile) and of the start of a body (95th), and the least share of use.
WANTED = {"claim_ms": 20.0, "start_ms": 50.0, "scaling": 0.9}


class Noting:
    """A Ray that notes when it was given each call."""

    def __init__(self, ray: RayExecutor) -> None:
        self._ray = ray
        self.given: list[float] = []
        self.ended: list[tuple[float, float]] = []

    def capacity(self) -> Capacity:
        """Return what there is."""
        return self._ray.capacity()

    def submit(self, call: TaskCall) -> int:
        """Start a call."""
        self.given.append(time.time())
        return self._ray.submit(call)

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        finished = self._ray.wait(timeout)
        self.ended += [(time.time(), each.output.metrics["seconds"]) for each in finished if each.output is not None]
        return finished

    def cancel(self, handle: int) -> None:
        """Stop a call."""
        self._ray.cancel(handle)

    def alive(self) -> bool:
        """Say whether it is there."""
        return self._ray.alive()

    def shutdown(self) -> None:
        """Leave it to its owner."""


def claims(url: str, finished: int, in_front: int, count: int) -> dict[str, float]:
    """Measure claims of one task."""
    upgrade(url)
    database = open_database(url)
    submit(database, [noop(["claimed", number]) for number in range(count + 20)])
    with database.session() as session:
        lock_graph(session)
        session.execute(text(_HISTORY), {"count": finished})
        session.execute(text(_IN_FRONT), {"count": in_front})
    with database.session() as session:
        session.execute(text("ANALYZE"))
    places = Places(1.0)
    places.look((Node("bench", "bench", 4.0, 1 << 34),))
    took = []
    for _ in range(count + 10):
        started = time.perf_counter()
        with database.session() as session:
            assert claim_tasks(session, owner="bench", limit=1, lease_seconds=600, picker=places.picker(1))
        took.append(1000 * (time.perf_counter() - started))
    database.close()
    return percentiles(took[10:], 99)


def percentiles(values: Sequence[float], percent: int) -> dict[str, float]:
    """Return the median and one more percentile."""
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cut[49], 2), f"p{percent}": round(cut[percent - 1], 2)}


def noop(payload: Any, seconds: float = 0.0) -> TaskNode:
    """Plan a task that waits."""
    return task_node("noop", Params(payload=payload, seconds=seconds).to_json(), {})


def starts(url: str, count: int, folder: Path) -> dict[str, dict[str, float]]:
    """Measure from the commit of a job to its only task's claim, and to its end less what its body took."""
    database = open_database(url)
    executor = Noting(RayExecutor.start(cpus=2))
    stop = threading.Event()
    scheduler = Scheduler(database, lambda: executor, SchedulerConfig(str(folder / "store"), folder / "cache"))
    serving = threading.Thread(target=scheduler.run, kwargs={"stop": stop})
    serving.start()
    claimed, began = [], []
    for number in range(count + 3):
        job = submit(database, [noop(["start", number])])
        committed = time.time()
        while not ended(database, job):
            time.sleep(0.02)
        # Long enough for the scheduler to ask as seldom as it does when idle.
        time.sleep(0.7)
        claimed.append(1000 * (executor.given[-1] - committed))
        at, seconds = executor.ended[-1]
        began.append(1000 * (at - seconds - committed))
    stop.set()
    serving.join()
    executor._ray.shutdown()
    database.close()
    return {"claimed": percentiles(claimed[3:], 95), "body": percentiles(began[3:], 95)}


def ended(database: Database, job: str) -> bool:
    """Say whether a job has succeeded."""
    with database.session(read_only=True) as session:
        return find_job(session, job).state == "succeeded"


def scaling(url: str, units: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Run units that sleep on more and more logical CPUs; return the share of the time that these were in use."""
    shares: dict[str, Any] = {}
    for cpus in (2, 4, 8):
        database = open_database(url)
        executor = Noting(RayExecutor.start(cpus=cpus))
        config = SchedulerConfig(str(folder / "store"), folder / "cache")
        # Workers start with their first task, which is none of the scheduler's time.
        for payload, many, each in (("warm", 2 * cpus, 1.0), ("unit", units * cpus // 2, seconds)):
            nodes = [noop([payload, cpus, number], each) for number in range(many)]
            # Only with all of them has the job ended, and nothing of one job runs on into the next.
            ends = {"all": [TaskRef(node.id, "blob") for node in nodes]}
            job = submit(database, [*nodes, task_node("noop", {"payload": [payload, cpus]}, ends)])
            executor.given.clear()
            executor.ended.clear()
            Scheduler(database, lambda executor=executor: executor, config).run(until_job=job, drain=True)
        *ended_units, _ = executor.ended
        took = max(at for at, _ in ended_units) - min(executor.given)
        work = sum(each for _, each in ended_units)
        shares[str(cpus)] = round(work / (took * cpus), 3)
        executor._ray.shutdown()
        database.close()
    return {"unit_seconds": seconds, "units_per_2_cpus": units, "efficiency_by_cpus": shares}


def main() -> None:
    """Measure and print the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--finished", type=int, default=1_000_000, help="finished tasks in the table")
    arguments.add_argument("--in-front", type=int, default=50_000, help="queued tasks that don't fit")
    arguments.add_argument("--claims", type=int, default=200)
    arguments.add_argument("--starts", type=int, default=40)
    arguments.add_argument("--units", type=int, default=32, help="units for every two CPUs")
    arguments.add_argument("--unit-seconds", type=float, default=0.2)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as name:
        folder = Path(name)
        (folder / "store").mkdir()
        with wheel_postgres(folder / "postgres") as url:
            upgrade(url)
            if options.starts:
                report["start_ms"] = starts(url, options.starts, folder)
            if options.units:
                report["scaling"] = scaling(url, options.units, options.unit_seconds, folder)
            if options.claims:
                history = {"finished": options.finished, "in_front": options.in_front}
                report["claim_ms"] = history | claims(url, options.finished, options.in_front, options.claims)
    give(report | {"wanted": WANTED, "ok": all(_kept(report))}, options.out)


def _kept(report: dict[str, Any]) -> Iterator[bool]:
    """Say of each figure that was measured whether it is as wanted."""
    if "claim_ms" in report:
        yield report["claim_ms"]["p99"] <= WANTED["claim_ms"]
    if "start_ms" in report:
        yield report["start_ms"]["body"]["p95"] <= WANTED["start_ms"]
    if "scaling" in report:
        yield min(report["scaling"]["efficiency_by_cpus"].values()) >= WANTED["scaling"]


if __name__ == "__main__":
    main()
