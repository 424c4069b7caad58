"""Small graphs to disturb, and what an undisturbed run of them gives, worked out without running anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.graph import TaskNode, TaskRef, task_node
from quant_spec.keys import task_key
from quant_spec.tasks.noop import Params

BLOB, ARTIFACT = "blob", "artifact"
SECONDS = (0.0, 0.02, 0.1)
#: How often there is each graph: the same shape, other tasks.
SERIES = 4


@dataclass(frozen=True, slots=True)
class Graph:
    """A job's tasks, the last its target; `release` is the name under which it publishes, if it does."""

    name: str
    nodes: tuple[TaskNode, ...]
    release: str | None


def noop(payload: Any, *sources: TaskNode, seconds: float = 0.0) -> TaskNode:
    """Plan a task that waits, and stores what follows from its payload and its sources."""
    inputs = {"sources": [TaskRef(source.id, BLOB) for source in sources]} if sources else {}
    return task_node("noop", Params(payload=payload, seconds=seconds).to_json(), inputs, label=str(payload))


def release(*sources: TaskNode) -> TaskNode:
    """Plan a task that publishes."""
    return task_node("release", {"model": "faults"}, {"packed": [TaskRef(source.id, BLOB) for source in sources]})


def _rows(series: int, width: int, depth: int, twin: float = 0.0) -> list[TaskNode]:
    """Plan rows of tasks, each of which reads two of the row before.

    `twin` is added to the first row's seconds: its tasks are others then and give the same bytes, so that the tasks
    of the second row, and of those below, have other ids and the same keys.
    """
    nodes: list[TaskNode] = []
    row: list[TaskNode] = []
    for level in range(depth):
        before = row
        row = [
            noop(
                [series, "row", level, place],
                *([before[place], before[(place + 1) % width]] if before else []),
                seconds=SECONDS[(level + place) % len(SECONDS)] + (0.0 if before else twin),
            )
            for place in range(width)
        ]
        nodes += row
    return nodes


def _graphs(series: int) -> tuple[Graph, ...]:
    grid, twin = _rows(series, 3, 3), _rows(series, 3, 3, twin=0.005)
    chain: list[TaskNode] = []
    for number in range(5):
        chain.append(noop([series, "chain", number], *chain[-1:], seconds=0.02))
    wide = [noop([series, "wide", number], seconds=SECONDS[number % 3]) for number in range(8)]
    return (
        Graph(f"grid {series}", (*grid, release(*grid[-3:])), "one"),
        Graph(f"twin {series}", (*twin, release(*twin[-3:])), "one"),
        Graph(f"part of grid {series}", (*grid[:6], noop([series, "part"], *grid[3:6])), None),
        # Its target is read by tasks of others.
        Graph(f"middle of grid {series}", tuple(grid[:5]), None),
        Graph(f"chain {series}", (*chain, release(chain[-1])), "one"),
        # Its last task waits for two of the others only, so that it ends while some are left.
        Graph(f"wide {series}", (*wide, noop([series, "wide end"], *wide), release(*wide[:2])), "two"),
        Graph(f"grid and chain {series}", (*grid, *chain, release(grid[-1], chain[-1])), "two"),
    )


#: Graphs that share tasks, ids of tasks, keys of tasks, and names of releases.
GRAPHS = tuple(graph for series in range(SERIES) for graph in _graphs(series))


def _plain(series: int) -> Graph:
    """Plan rows and a chain of tasks that take a while, for workers that run the real bodies; nothing is published."""
    nodes: list[TaskNode] = []
    row: list[TaskNode] = []
    for level in range(4):
        before = row
        row = [
            noop(
                [series, "plain", level, place],
                *([before[place], before[(place + 1) % 4]] if before else []),
                seconds=0.2 + 0.3 * place,
            )
            for place in range(4)
        ]
        nodes += row
    return Graph(f"plain {series}", (*nodes, noop([series, "plain end"], *row)), None)


#: Graphs for real processes.
PLAIN_GRAPHS = tuple(_plain(series) for series in range(SERIES))


def artifact_of(inputs: Mapping[str, Sequence[str]]) -> str:
    """Return the digest of what a release of some packed blobs is."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def undisturbed(graph: Graph) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return each key's outputs, and the target's: what a run that nothing disturbs records."""
    blobs: dict[str, bytes] = {}
    outputs: dict[str, dict[str, str]] = {}
    by_key: dict[str, dict[str, str]] = {}
    for node in graph.nodes:
        resolved = {
            name: [outputs[item.task][item.output] if isinstance(item, TaskRef) else item for item in items]
            for name, items in node.inputs.items()
        }
        if node.kind == "release":
            outputs[node.id] = {ARTIFACT: artifact_of(resolved)}
        else:
            digest = hashlib.sha256(json.dumps(node.params["payload"], sort_keys=True).encode())
            for source in [item for _, items in sorted(resolved.items()) for item in items]:
                digest.update(blobs[source])
            made = digest.digest()
            blob = hashlib.sha256(made).hexdigest()
            blobs[blob] = made
            outputs[node.id] = {BLOB: blob}
        by_key[task_key(node.kind, node.version, node.params, resolved)] = outputs[node.id]
    return by_key, outputs[graph.nodes[-1].id]
