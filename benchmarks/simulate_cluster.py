"""Where the design breaks first: a model of queue, orchestrators, cluster and store, with measured constants.

    python -m benchmarks.simulate_cluster [--gpus 100 1000] [--seconds 1 10 60] [--orchestrators 1 4] [--tasks 20000]
        [--database-cpus 8] [--results benchmarks/results] [--out FILE]

What a task costs in CPU of orchestrator, driver and Postgres comes from `search-scale.json`, as it was measured there.
What placement costs depends on how much runs, and is measured here, on nodes of 8 GPUs.

The model is of discrete events. Each GPU runs one task and has one queued behind it. The end of a task goes to its
orchestrator, which does pass after pass: it takes up to 64 ends that have come, spends its CPU on them, and waits for
the database, which serves so many at once as it has CPUs, and for a commit; then the GPUs of these ends have their next
tasks. An orchestrator has an equal share of the GPUs; all share the database. Bodies take times of an exponential
distribution with the given mean, and wait for two requests to the store besides. Prints one JSON document: for each
case the share of the time that GPUs were busy, tasks a second, how busy orchestrators and database were, and which of
them was the limit.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cli import give, parser
from benchmarks.queue_compare import ROOT, machine
from orchestrator.db.rows import Candidate, Wishes
from orchestrator.graph import Resources
from orchestrator.scheduling.picker import Places
from workers.execution.cluster import Node, own_versions

#: Ends that an orchestrator records at once, at most; as in `orchestrator.scheduling.scheduler`.
BATCH = 64
#: Seconds of one request to an object store in the same region, and how many a task makes.
STORE_SECONDS, STORE_REQUESTS = 0.02, 2
#: Seconds of a commit and the round trips of a pass, beside the database's CPU.
COMMIT_SECONDS = 0.005
_GPUS_A_NODE = 8


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds a task: of an orchestrator's CPU, of its driver's, of the database's; of placement also a pass."""

    orchestrator: float
    driver: float
    database: float
    placement_pass: float
    placement: float


def measured(results: Path) -> tuple[dict[str, float], str]:
    """Return seconds a task of orchestrator, driver and database, and on what that was measured.

    The first two from the largest run on Postgres, the database's from the run in which it was greatest.
    """
    cases = json.loads((results / "search-scale.json").read_text())["cases"]
    cases = [case for case in cases if case["database"] == "postgres"]
    largest = max(cases, key=lambda case: case["tasks_run"])
    cpu = largest["cpu_ms_a_task"]
    database = max(case["cpu_ms_a_task"].get("postgres", 0.0) for case in cases)
    costs = {"orchestrator": cpu["orchestrator"], "driver": cpu["ray driver"], "database": database}
    return {name: milliseconds / 1000 for name, milliseconds in costs.items()}, largest["machine"]


def placement_seconds(gpus: int) -> tuple[float, float]:
    """Measure the CPU seconds that placement takes on a cluster that is full: for a pass, and for each task of it."""
    one, many = _pass_seconds(gpus, 1), _pass_seconds(gpus, BATCH)
    task = max(0.0, (many - one) / (BATCH - 1))
    return max(0.0, one - task), task


def _pass_seconds(gpus: int, ends: int) -> float:
    versions = dict(own_versions())
    nodes = tuple(
        Node(str(number), str(number), 64.0, 1 << 40, _GPUS_A_NODE, 80 << 30, "H100", versions=versions, cuda_ok=True)
        for number in range(-(-gpus // _GPUS_A_NODE))
    )
    places = Places(2.0)
    numbers = itertools.count()

    def claim() -> int:
        candidates = [_candidate(next(numbers)) for _ in range(BATCH)]
        picker = places.picker(BATCH)
        found = picker.pick(candidates)
        places.running |= {task: picker.placements[task] for task in found}
        return len(found)

    places.look(nodes)
    while claim():
        pass
    begun, passes = time.process_time(), 0
    while time.process_time() - begun < 1.0:
        for task in list(places.running)[:ends]:
            places.end(task)
        places.look(nodes)
        places.has_room()
        claim()
        places.occupied()
        passes += 1
    return (time.process_time() - begun) / passes


def _candidate(number: int) -> Candidate:
    resources = Resources(1.0, 0.0, 1 << 30, 60 << 30)
    return Candidate(id=f"{number}", key=f"{number}", kind="noop", version=1, resources=resources, wishes=Wishes())


@dataclass
class Server:
    """Something that serves so many at once."""

    free_at: list[float]
    busy: float = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """Return when something that comes now, and takes so long, is done."""
        begun = max(now, heapq.heappop(self.free_at))
        heapq.heappush(self.free_at, begun + seconds)
        self.busy += seconds
        return begun + seconds


@dataclass
class Orchestrator:
    """One orchestrator: ends that wait for its next pass, and what it has been busy with."""

    ends: deque[int] = field(default_factory=deque)
    is_busy: bool = False
    own: float = 0.0


@dataclass
class Model:
    """The whole cluster; times are seconds since the beginning."""

    gpus: int
    seconds: float
    orchestrators: list[Orchestrator]
    database: Server
    costs: Costs
    left: int
    chance: random.Random

    def run(self) -> dict[str, Any]:
        """Run until the last task has been handed out; return the figures: the emptying at the end is left out."""
        events: list[tuple[float, int, str, int]] = []
        order = itertools.count()
        queued = [1] * self.gpus
        running = [False] * self.gpus
        ended, worked, now = 0, 0.0, 0.0

        def begin(gpu: int) -> None:
            nonlocal worked
            body = self.chance.expovariate(1 / self.seconds) + STORE_REQUESTS * STORE_SECONDS
            queued[gpu] -= 1
            running[gpu] = True
            worked += body
            heapq.heappush(events, (now + body, next(order), "end", gpu))

        def begin_pass(number: int) -> None:
            each = self.orchestrators[number]
            size = min(BATCH, len(each.ends))
            own = self.costs.placement_pass + size * (self.costs.orchestrator + self.costs.placement)
            each.own += own
            each.is_busy = True
            done = self.database.serve(now + own, size * self.costs.database) + COMMIT_SECONDS
            # Its driver works meanwhile, and is the limit only where it takes longer.
            done = max(done, now + size * self.costs.driver)
            heapq.heappush(events, (done, next(order), "pass", number * (BATCH + 1) + size))

        for gpu in range(self.gpus):
            queued[gpu] = 2
            begin(gpu)
        self.left -= 2 * self.gpus
        while self.left > 0:
            now, _, what, which = heapq.heappop(events)
            if what == "end":
                running[which] = False
                ended += 1
                if queued[which]:
                    begin(which)
                number = which % len(self.orchestrators)
                self.orchestrators[number].ends.append(which)
            else:
                number, size = divmod(which, BATCH + 1)
                self.orchestrators[number].is_busy = False
                for _ in range(size):
                    gpu = self.orchestrators[number].ends.popleft()
                    if self.left > 0:
                        self.left -= 1
                        queued[gpu] += 1
                        if not running[gpu]:
                            begin(gpu)
            if self.orchestrators[number].ends and not self.orchestrators[number].is_busy:
                begin_pass(number)
        worked -= sum(at - now for at, _, what, _ in events if what == "end")
        return self._figures(ended, worked, now)

    def _figures(self, tasks: int, worked: float, took: float) -> dict[str, Any]:
        shares = {
            "gpus": worked / (self.gpus * took),
            "orchestrators": sum(each.own for each in self.orchestrators) / (len(self.orchestrators) * took),
            "database": self.database.busy / (len(self.database.free_at) * took),
        }
        return {
            "tasks_per_second": round(tasks / took, 1),
            "busy": {name: round(share, 3) for name, share in shares.items()},
            "limit": max(shares, key=lambda name: shares[name]),
        }


def main() -> None:
    """Run the model for every case and print the figures."""
    arguments = parser(__doc__)
    arguments.add_argument("--gpus", type=int, nargs="+", default=[100, 1000])
    arguments.add_argument("--seconds", type=float, nargs="+", default=[1.0, 10.0, 60.0], help="means of bodies")
    arguments.add_argument("--orchestrators", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--tasks", type=int, default=20_000, help="as many as show the steady state")
    arguments.add_argument("--database-cpus", type=int, default=8)
    arguments.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    costs, source = measured(options.results)
    placement = {gpus: placement_seconds(gpus) for gpus in options.gpus}
    cases = []
    for gpus, seconds, many in itertools.product(options.gpus, options.seconds, options.orchestrators):
        model = Model(
            gpus,
            seconds,
            [Orchestrator() for _ in range(many)],
            Server([0.0] * options.database_cpus),
            Costs(**costs, placement_pass=placement[gpus][0], placement=placement[gpus][1]),
            max(options.tasks, 20 * gpus),
            random.Random(0),
        )
        cases.append({"gpus": gpus, "body_seconds": seconds, "orchestrators": many, **model.run()})
    milliseconds = {name: round(1000 * value, 3) for name, value in costs.items()}
    placed = {
        f"{gpus} GPUs": {"ms_a_pass": round(1000 * one, 3), "ms_a_task": round(1000 * each, 3)}
        for gpus, (one, each) in placement.items()
    }
    report: dict[str, Any] = {
        "machine": machine(),
        "measured_on": source,
        "ms_a_task": milliseconds,
        "placement": placed,
    }
    report |= {"cases": cases}
    give(report | {"store": {"request_seconds": STORE_SECONDS, "requests_a_task": STORE_REQUESTS}}, options.out)


if __name__ == "__main__":
    main()
