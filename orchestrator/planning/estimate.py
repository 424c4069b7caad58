"""Say before anything runs what a job will take: which tasks are cached, seconds, memory.

Seconds of a task are a fixed part per kind and a rate per GMAC of its `work`. The rate comes from recorded tasks of
that kind, else from the shipped table scaled by how this machine's recorded kinds compare with it. The queue is then
simulated: tasks in the order planned, as soon as their inputs exist, on so many CPUs; so neither the CPUs nor the
longest chain of dependencies is forgotten.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.db.rows import Timing
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import GIB, WORKER_BYTES
from quant_spec.keys import task_key
from quant_spec.kinds import KINDS

#: Processes beside the workers: the orchestrator, Ray's own.
SERVICE_BYTES = int(0.6 * GIB)
#: From the command to the first task: processes, Ray, and torch in the workers.
STARTUP_SECONDS = 8.0

#: What an estimate of memory is multiplied by, at least and at most, whatever earlier tasks of the kind took.
_LEARNED = (0.25, 4.0)
#: What a task needs beside what the largest of its kind took.
_MARGIN = 1.1

#: What tasks work on that are not on one text encoder alone.
PROMPTS, DENOISER = "prompts", "denoiser"

KnownResults = Callable[[Sequence[str]], Mapping[str, Mapping[str, str]]]
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds of a task: `fixed` + `per_gmac` x work."""

    fixed: float
    per_gmac: float

    def seconds(self, work: float) -> float:
        """Return the seconds of a task with that work (GMAC)."""
        return self.fixed + self.per_gmac * work


_PER_GMAC = 0.03
_FIXED = 0.5
#: Fixed seconds of kinds that load more than others, and of those that hardly compute.
_OTHER_FIXED = {
    **{"inspect": 3.0, "score": 2.5},
    **{"step_bits": 0.2, "allocate": 0.2, "correct": 0.2, "release": 0.2, "mix": 0.2, "choose": 0.2, "noop": 0.01},
}
#: For a home without recorded tasks; measured on one core of a current server CPU (AMD EPYC, float32).
DEFAULT_RATES: Mapping[str, Rate] = {kind: Rate(_OTHER_FIXED.get(kind, _FIXED), _PER_GMAC) for kind in KINDS}
_UNKNOWN = Rate(_FIXED, _PER_GMAC)


@dataclass(frozen=True, slots=True)
class KindEstimate:
    """Tasks of one kind; `seconds` are CPU seconds of those that will run."""

    tasks: int
    cached: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job will take: `seconds` from start to release, `peak_memory_bytes` of all processes together.

    `component_memory` has the most that a single task takes, of those that will run, by what the task works on.
    """

    tasks: int
    cached: int
    seconds: float
    peak_memory_bytes: int
    per_kind: Mapping[str, KindEstimate]
    component_memory: Mapping[str, int] = field(default_factory=dict)


def estimate(
    nodes: Iterable[TaskNode],
    timings: Mapping[str, Timing],
    cached: Collection[str] = frozenset(),
    *,
    cpus: int,
) -> Estimate:
    """Estimate a job.

    Parameters
    ----------
    nodes
        Its tasks, each after all that it depends on.
    timings
        What recorded tasks of each kind took.
    cached
        Ids of tasks that need no computing (`cached_tasks`).
    cpus
        Tasks that run at once, at most.

    Raises
    ------
    ValueError
        If `cpus` is less than 1, or a task stands before one that it depends on.
    """
    if cpus < 1:
        raise ValueError(f"cpus: got {cpus}, wanted at least 1")
    rates = fitted_rates(timings)
    counts: dict[str, list[float]] = {}
    memory_of: dict[str, int] = {}
    queue = _Simulation(cpus)
    for node in nodes:
        seconds = rates.get(node.kind, _UNKNOWN).seconds(node.work)
        count = counts.setdefault(node.kind, [0, 0, 0.0])
        count[0] += 1
        if node.id in cached:
            count[1] += 1
            queue.skip(node.id)
        else:
            count[2] += seconds
            known = timings.get(node.kind)
            memory = learned_memory(node.resources.memory_bytes, known.memory_ratio if known else 0.0)
            queue.add(node, seconds, int(memory))
            part = component_of(node)
            memory_of[part] = max(memory_of.get(part, 0), int(memory))
    elapsed, peak, width = queue.run()
    per_kind = {kind: KindEstimate(int(n), int(hits), seconds) for kind, (n, hits, seconds) in counts.items()}
    return Estimate(
        tasks=sum(kind.tasks for kind in per_kind.values()),
        cached=sum(kind.cached for kind in per_kind.values()),
        seconds=STARTUP_SECONDS + elapsed if width else 0.0,
        peak_memory_bytes=SERVICE_BYTES + peak if width else 0,
        per_kind=per_kind,
        component_memory=memory_of,
    )


def component_of(node: TaskNode) -> str:
    """Return what of a pipeline a task works on: a text encoder, all that encode prompts, or the denoiser."""
    if node.kind == "text_encoder":
        return str(node.params["component"])
    return PROMPTS if node.kind == "encode" else DENOISER


def learned_memory(estimate: int, ratio: float) -> float:
    """Return an estimate of memory, bytes, as recorded tasks would have it.

    Parameters
    ----------
    ratio
        The greatest of what tasks of the kind took to what had been estimated (`Timing`); 0: nothing is known.
    """
    if ratio <= 0:
        return estimate
    least, most = _LEARNED
    return estimate * min(max(ratio * _MARGIN, least), most)


def fitted_rates(timings: Mapping[str, Timing]) -> dict[str, Rate]:
    """Return the rate of every kind, fitted to what recorded tasks took.

    The fixed part is the shipped one, but no more than half of what a task took in the mean; the rest goes by work.
    """
    measured = {kind: _fit(DEFAULT_RATES.get(kind, _UNKNOWN), timing) for kind, timing in timings.items() if timing.n}
    ratios = [
        (math.log(rate.per_gmac / DEFAULT_RATES[kind].per_gmac), timings[kind].seconds)
        for kind, rate in measured.items()
        if kind in DEFAULT_RATES and rate.per_gmac > 0 and timings[kind].work > 0
    ]
    total = sum(weight for _, weight in ratios)
    speed = math.exp(sum(ratio * weight for ratio, weight in ratios) / total) if total else 1.0
    scaled = {kind: Rate(rate.fixed, rate.per_gmac * speed) for kind, rate in DEFAULT_RATES.items()}
    return scaled | measured


def _fit(default: Rate, timing: Timing) -> Rate:
    mean = timing.seconds / timing.n
    if timing.work <= 0:
        return Rate(mean, 0.0)
    fixed = min(default.fixed, mean / 2)
    return Rate(fixed, (timing.seconds - timing.n * fixed) / timing.work)


def cached_tasks(nodes: Iterable[TaskNode], known_results: KnownResults) -> frozenset[str]:
    """Find the tasks whose results are recorded already.

    Parameters
    ----------
    nodes
        A job's tasks, each after all that it depends on.
    known_results
        Returns the outputs of those of the given keys that have a result.

    Returns
    -------
    frozenset of str
        Ids. A task's key is known only when all its inputs are, so nothing that follows an unknown result is in it.
    """
    outputs: dict[str, Mapping[str, str]] = {}
    waiting: dict[str, list[str]] = {}  # key -> ids: tasks that can be looked up; equal keys may have several ids
    waiting_ids: set[str] = set()

    def look_up() -> None:
        for key, found in known_results(list(waiting)).items():
            outputs.update(dict.fromkeys(waiting[key], found))
        waiting.clear()
        waiting_ids.clear()

    for node in nodes:
        if len(waiting) >= _BATCH or not waiting_ids.isdisjoint(node.sources()):
            look_up()
        key = _key(node, outputs)
        if key is not None:
            waiting.setdefault(key, []).append(node.id)
            waiting_ids.add(node.id)
    look_up()
    return frozenset(outputs)


def _key(node: TaskNode, outputs: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return a task's key, or None while an input is unknown."""
    resolved: dict[str, list[str]] = {}
    for name, items in node.inputs.items():
        digests = [outputs.get(item.task, {}).get(item.output) if isinstance(item, TaskRef) else item for item in items]
        present = [digest for digest in digests if digest is not None]
        if len(present) < len(digests):
            return None
        resolved[name] = present
    return task_key(node.kind, node.version, node.params, resolved)


class _Simulation:
    """The queue on so many CPUs: whenever one is free it takes the task that was planned first of those ready."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.places: dict[str, int] = {}  # of the tasks to run; skipped ones have -1
        self.seconds: list[float] = []
        self.memory: list[int] = []
        self.missing: list[int] = []  # inputs that a task waits for
        self.dependents: defaultdict[int, list[int]] = defaultdict(list)

    def skip(self, task: str) -> None:
        """Take note of a task that is done already."""
        self.places[task] = -1

    def add(self, node: TaskNode, seconds: float, memory_bytes: int) -> None:
        """Take note of a task that is to run."""
        place = len(self.seconds)
        sources = node.sources()
        if unknown := sources - self.places.keys():
            raise ValueError(f"task {node.id}: got a dependency {min(unknown)} that does not stand before it")
        waits = {self.places[source] for source in sources} - {-1}
        self.places[node.id] = place
        self.seconds.append(seconds)
        self.memory.append(max(memory_bytes, WORKER_BYTES))
        self.missing.append(len(waits))
        for source in waits:
            self.dependents[source].append(place)

    def run(self) -> tuple[float, int, int]:
        """Return seconds until all is done, the most bytes in use at once, and the most tasks at once."""
        ready = [place for place, missing in enumerate(self.missing) if missing == 0]
        running: list[tuple[float, int]] = []
        now, used, peak, width = 0.0, 0, 0, 0
        while ready or running:
            while ready and len(running) < self.cpus:
                place = heapq.heappop(ready)
                heapq.heappush(running, (now + self.seconds[place], place))
                used += self.memory[place]
            width = max(width, len(running))
            # a worker that has nothing to do keeps its torch
            peak = max(peak, used + (width - len(running)) * WORKER_BYTES)
            now, place = heapq.heappop(running)
            used -= self.memory[place]
            for dependent in self.dependents.pop(place, ()):
                self.missing[dependent] -= 1
                if self.missing[dependent] == 0:
                    heapq.heappush(ready, dependent)
        return now, peak, width
