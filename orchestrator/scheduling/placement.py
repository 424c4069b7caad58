"""Where tasks run: a pure function of the cluster's nodes, of what runs on them, and of the tasks in the queue's order.

A task *starts* where its CPUs, memory and share of a GPU are free. Behind each running task one of the same shape may
be *queued* on the same node, which starts when that one ends, so that the executor always has a next task. The first
task that can do neither keeps its room: later ones start only where they leave it free, and none is queued any more.

A task that gains by a GPU runs on one wherever the cluster has one that fits and its job allows it. A share of a GPU is
a task's device memory over the GPU's, in sixteenths; above a half it is a whole GPU, so is that of a task that must be
alone. A model that no single GPU holds takes several of one node, if its kind can be spread over them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.db.rows import Candidate, Timing, Wishes
from orchestrator.graph import Resources
from orchestrator.planning.estimate import learned_memory
from workers.execution.cluster import CPU, CUDA, Node, in_steps, version_problem

#: A share of a GPU is a multiple of this; more than `_WHOLE_FROM` of one is the whole.
STEP = 1 / 16
_WHOLE_FROM = 0.5
#: Host memory of a task that ran out of memory and runs on a GPU again, in estimates.
_ALONE_MEMORY = 2


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a task runs, and what it occupies there.

    `gpus` is a share of one GPU or a number of whole ones; `slots` says which by our own count (the executor has its
    own), and is empty for a task that is `queued` behind one of the same shape; there it counts as `weight` tasks.
    """

    node: str
    host: str
    device: str
    cpus: float
    memory_bytes: int
    gpus: float = 0.0
    gpu_type: str | None = None
    slots: tuple[int, ...] = ()
    queued: bool = False
    weight: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether it has GPUs to itself."""
        return self.gpus >= 1

    @property
    def device_type(self) -> str:
        """ "cpu" or the type of GPU."""
        return CPU if self.device == CPU else self.gpu_type or CUDA

    @property
    def shape(self) -> tuple[str, str, float, int, float]:
        """What must be equal for one task to take another's place."""
        return (self.node, self.device, self.cpus, self.memory_bytes, self.gpus)


@dataclass(frozen=True, slots=True)
class Decision:
    """Where tasks start or are queued, by id; `kept_for` is the first that could not, `pinned` those whose job is bound
    to the type of device that they got."""

    placements: Mapping[str, Placement] = field(default_factory=dict)
    kept_for: Candidate | None = None
    pinned: frozenset[str] = frozenset()


#: Kind, version, resources and wishes of a task: all that placement knows of it.
_Asked = tuple[str, int, Resources, Wishes]
#: (kind, type of device) to what is known of its tasks.
Learned = Mapping[tuple[str, str], Timing]


def usable(
    nodes: Sequence[Node], versions: Mapping[str, str], refused: Mapping[str, tuple[str, str]]
) -> tuple[list[Node], dict[str, str]]:
    """Return the nodes that may take tasks, and why others, or the GPUs of some, may not.

    Parameters
    ----------
    versions
        Of the packages that the orchestrator has; nodes with others are left out.
    refused
        Node to what its worker said when it refused a task, and the device that this was for: "cuda" leaves its GPUs
        out, "cpu" the whole node.
    """
    good, why = [], {}
    for node in nodes:
        device, said = refused.get(node.id, ("", ""))
        problem = node.problem or version_problem(node.versions, versions, node.host)
        problem = problem or (said if device == CPU else "")
        if problem:
            why[node.host] = problem
            continue
        if node.gpus and (device == CUDA or not node.cuda_ok):
            why[node.host] = said or (
                f"{node.host}: got no CUDA device from torch, wanted the {node.gpus} GPUs that Ray has; only its CPUs "
                "are used"
            )
            node = replace(node, gpus=0)
        good.append(node)
    return good, why


def place(
    nodes: Sequence[Node],
    running: Sequence[Placement],
    tasks: Iterable[Candidate],
    *,
    learned: Learned | None = None,
    queued_per_running: float = 1.0,
    weight: Callable[[str, int], float] = lambda kind, version: 1.0,
    most: int | None = None,
) -> Decision:
    """Decide where tasks run.

    Parameters
    ----------
    nodes
        The usable ones.
    running
        What runs, or is queued, on them already.
    tasks
        Best first; no more are taken than have a chance.
    learned
        What recorded tasks took; scales the estimates.
    queued_per_running
        How many tasks may be queued behind each running one of their shape; 0 queues none.
    weight
        What a task of a kind and version counts as there: little if such tasks take no time.
    most
        How many tasks are placed at most.
    """
    state = _Cluster(nodes, running, queued_per_running)
    placements: dict[str, Placement] = {}
    kept_for: Candidate | None = None
    pinned: set[str] = set()
    # What tasks that ask for the same could occupy; none if there is no room for them: placing others makes none.
    known: dict[_Asked, list[Placement]] = {}
    for task in tasks:
        if task.is_unpinned and pinned:
            continue  # its job may be bound to a type by the one before
        asked = (task.kind, task.version, task.resources, task.wishes)
        if asked not in known:
            known[asked] = list(_options(nodes, task, learned or {}))
        options = known[asked]
        if not options:
            continue
        share = weight(task.kind, task.version)
        found = state.start(options) or (state.queue(options, share) if kept_for is None else None)
        if found is None:
            known[asked] = []
            if kept_for is None:
                kept_for = task
                state.keep(options)
            if not state.has_cpu():
                break
            continue
        placements[task.id] = found
        if task.is_unpinned:
            pinned.add(task.id)
        if len(placements) == most:
            break
    return Decision(placements, kept_for, frozenset(pinned))


def ended(running: Mapping[str, Placement], task: str) -> dict[str, Placement]:
    """Return what runs once a task has ended: the first that was queued behind one of its shape takes its place."""
    left = dict(running)
    gone = left.pop(task, None)
    if gone is None or gone.queued:
        return left
    for other, placement in left.items():
        if placement.queued and placement.shape == gone.shape:
            left[other] = replace(placement, queued=False, slots=gone.slots)
            break
    return left


def gpu_share(needed_bytes: float, gpu_bytes: int) -> float:
    """Return the share of a GPU that a task takes, in sixteenths; a whole one if more than half, or if unknown."""
    if gpu_bytes <= 0:
        return 1.0
    share = max(STEP, math.ceil(needed_bytes / gpu_bytes / STEP) * STEP)
    return 1.0 if share > _WHOLE_FROM else share


def _options(nodes: Sequence[Node], task: Candidate, learned: Learned) -> Iterator[Placement]:
    """Yield what a task would occupy on each node that could take it if nothing else ran."""
    asks = task.resources
    wishes = task.wishes
    if asks.gpu_memory_bytes > 0 and wishes.device != CPU:
        on_gpu = [option for node in nodes if (option := _gpu_option(node, task, learned)) is not None]
        if not on_gpu and wishes.device == CUDA:
            # The estimate says that none fits; the largest is tried, and says so itself.
            typed = [node for node in nodes if node.gpus and _is_type(node, wishes.gpu_type)]
            most = max((node.gpu_memory_bytes for node in typed), default=0)
            largest = [node for node in typed if node.gpu_memory_bytes == most]
            on_gpu = [_on(node, task, CUDA, 1.0, learned) for node in largest]
        if on_gpu or wishes.device == CUDA:
            yield from on_gpu
            return
    yield from _cpu_options(nodes, task, learned)


def _gpu_option(node: Node, task: Candidate, learned: Learned) -> Placement | None:
    """Return what a task would take of a node's GPUs; None if they are not for it."""
    if not node.gpus or not _is_type(node, task.wishes.gpu_type):
        return None
    known = learned.get((task.kind, node.gpu_type or CUDA))
    needed = learned_memory(task.resources.gpu_memory_bytes, known.gpu_memory_ratio if known else 0.0)
    if not 0 < node.gpu_memory_bytes < needed:
        share = 1.0 if task.wishes.alone else gpu_share(needed, node.gpu_memory_bytes)
        return _on(
            node, task, CUDA, max(share, math.ceil(task.resources.gpus) if task.resources.gpus > 1 else 0), learned
        )
    count = math.ceil(needed / node.gpu_memory_bytes)
    return _on(node, task, CUDA, float(count), learned) if task.shards and count <= node.gpus else None


def _cpu_options(nodes: Sequence[Node], task: Candidate, learned: Learned) -> Iterator[Placement]:
    """Yield what a task would take of nodes' CPUs; one that no node could hold gets all of the largest."""
    options = [_on(node, task, CPU, 0.0, learned) for node in nodes]
    fits = [option for node, option in zip(nodes, options, strict=True) if _holds(node, option)]
    if fits or not nodes:
        yield from fits
        return
    largest = max(range(len(nodes)), key=lambda place: (nodes[place].memory_bytes, nodes[place].cpus))
    node, option = nodes[largest], options[largest]
    yield replace(option, cpus=min(option.cpus, node.cpus), memory_bytes=min(option.memory_bytes, node.memory_bytes))


def _holds(node: Node, option: Placement) -> bool:
    return option.cpus <= node.cpus and option.memory_bytes <= node.memory_bytes


def _on(node: Node, task: Candidate, device: str, gpus: float, learned: Learned) -> Placement:
    """Return what a task would occupy on a node."""
    asks, gpu_type = task.resources, node.gpu_type if device == CUDA else None
    known = learned.get((task.kind, CPU if device == CPU else gpu_type or CUDA))
    memory = int(learned_memory(asks.memory_bytes, known.memory_ratio if known else 0.0))
    if task.wishes.alone:
        memory = node.memory_bytes if device == CPU else min(_ALONE_MEMORY * memory, node.memory_bytes)
    cpus = asks.cpus
    if device == CUDA:
        # What the CPUs and memory beside a GPU cannot hold in full is still best run there.
        cpus, memory = min(cpus, node.cpus), min(memory, node.memory_bytes)
    # As the executor gives it out; so tasks of nearly the same size take each other's place.
    memory = max(memory, min(in_steps(memory), node.memory_bytes))
    return Placement(node.id, node.host, device, cpus, memory, gpus, gpu_type)


def _is_type(node: Node, wanted: str | None) -> bool:
    return wanted is None or (node.gpu_type or "").casefold() == wanted.casefold()


class _Free:
    """What is free on one node now."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus, self.memory = node.cpus, node.memory_bytes
        self.slots = [1.0] * node.gpus
        #: CPUs that tasks without a GPU leave to those with one
        self.beside = min(float(node.gpus), node.cpus / 2)

    def take(self, placement: Placement) -> None:
        """Occupy what a running task does."""
        self.cpus -= placement.cpus
        self.memory -= placement.memory_bytes
        each = min(placement.gpus, 1.0)
        for slot in placement.slots:
            self.slots[slot] -= each

    def slots_for(self, option: Placement) -> tuple[int, ...] | None:
        """Return the GPUs that a task would get: the fullest that has the share, or as many empty ones; else None."""
        if option.device == CPU:
            return ()
        if option.gpus > 1:
            empty = [slot for slot, left in enumerate(self.slots) if left >= 1]
            return tuple(empty[: int(option.gpus)]) if len(empty) >= option.gpus else None
        fits = [(left, slot) for slot, left in enumerate(self.slots) if left >= option.gpus]
        return (min(fits)[1],) if fits else None

    def fits(self, option: Placement) -> tuple[int, ...] | None:
        """Return the GPUs of a task that can start now, () if it takes none; None if it cannot."""
        idle = self.node.cpus == self.cpus
        beside = 0.0 if option.device == CUDA or idle else self.beside
        if self.cpus - option.cpus < beside or self.memory < option.memory_bytes:
            return None
        return self.slots_for(option)

    def missing(self, option: Placement) -> tuple[float, float]:
        """Return how much must become free for a task: of GPUs and CPUs, and bytes."""
        gpus = 0.0
        if option.device == CUDA:
            there = max(self.slots) if option.gpus <= 1 else float(sum(left >= 1 for left in self.slots))
            gpus = max(0.0, option.gpus - there)
        return gpus + max(0.0, option.cpus - self.cpus), max(0.0, option.memory_bytes - self.memory)


class _Cluster:
    """All nodes while tasks are placed on them one after another."""

    def __init__(self, nodes: Sequence[Node], running: Sequence[Placement], queued_per_running: float) -> None:
        self._free = {node.id: _Free(node) for node in nodes}
        self._queued_per_running = queued_per_running
        self._running: Counter[tuple[object, ...]] = Counter()
        self._queued: defaultdict[tuple[object, ...], float] = defaultdict(float)
        for placement in running:
            if placement.node in self._free:
                self._note(placement)

    def _note(self, placement: Placement) -> None:
        if placement.queued:
            self._queued[placement.shape] += placement.weight
        else:
            self._running[placement.shape] += 1
            self._free[placement.node].take(placement)

    def start(self, options: Sequence[Placement]) -> Placement | None:
        """Start a task where that is best, if it is possible anywhere."""
        found = [(option, slots) for option in options if (slots := self._free[option.node].fits(option)) is not None]
        if not found:
            return None
        option, slots = min(found, key=lambda each: self._cost(*each))
        placement = replace(option, slots=slots)
        self._note(placement)
        return placement

    def _cost(self, option: Placement, slots: tuple[int, ...]) -> tuple[float, ...]:
        """Return what placing a task there wastes: on a GPU, what is left of it; else GPU nodes, then the fullest."""
        free = self._free[option.node]
        if option.device == CUDA:
            left = sum(free.slots[slot] for slot in slots) - option.gpus
            return (left, free.node.gpu_memory_bytes, -free.cpus)
        return (free.node.gpus > 0, -free.cpus)

    def has_cpu(self) -> bool:
        """Say whether a CPU is free anywhere."""
        return any(free.cpus > 0 for free in self._free.values())

    def queue(self, options: Sequence[Placement], weight: float) -> Placement | None:
        """Queue a task behind one of its shape, where the least waits."""
        open_ = [
            option
            for option in options
            if self._queued[option.shape] + weight <= self._running[option.shape] * self._queued_per_running
        ]
        if not open_:
            return None
        placement = replace(min(open_, key=lambda each: self._queued[each.shape]), queued=True, weight=weight)
        self._note(placement)
        return placement

    def keep(self, options: Sequence[Placement]) -> None:
        """Keep room for a task that cannot start yet, where the least is missing."""

        option = min(options, key=lambda each: self._free[each.node].missing(each))
        free = self._free[option.node]
        emptiest = sorted(range(len(free.slots)), key=lambda slot: -free.slots[slot])
        slots = tuple(emptiest[: math.ceil(option.gpus)]) if option.device == CUDA else ()
        free.take(replace(option, slots=slots))


def has_room(nodes: Sequence[Node], running: Sequence[Placement], queued_per_running: float = 1.0) -> bool:
    """Say whether any task could start or be queued."""
    queued = [placement.weight for placement in running if placement.queued]
    return free_room(nodes, running) is not None or sum(queued) < (len(running) - len(queued)) * queued_per_running


def free_room(nodes: Sequence[Node], running: Sequence[Placement]) -> Resources | None:
    """Return the most CPUs, GPUs and memory that are free on a node; None if no node has a CPU free."""
    free = {node.id: _Free(node) for node in nodes}
    for placement in running:
        if placement.node in free and not placement.queued:
            free[placement.node].take(placement)
    open_ = [each for each in free.values() if each.cpus > 0 and each.memory >= 0]
    if not open_:
        return None
    gpus = max(float(math.ceil(max(each.slots, default=0.0))) for each in open_)
    return Resources(max(each.cpus for each in open_), gpus, max(each.memory for each in open_))
