"""Claims what the cluster has room for: keeps what runs where, and which nodes are left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.db.picking import Picked
from orchestrator.db.rows import Candidate
from orchestrator.graph import Resources
from orchestrator.scheduling.pace import Pace
from orchestrator.scheduling.placement import Learned, Placement, ended, has_room, place, usable
from workers.execution.cluster import CPU, CUDA, Node, own_versions

log = logging.getLogger(__name__)


@dataclass
class Places:
    """What runs where on a cluster; one for as long as an executor lives.

    `in_flight` is how many times the cluster's capacity may be claimed, so that the executor has a next task; `pace`
    lets more of the short ones be.
    """

    in_flight: float
    learned: Learned = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    nodes: tuple[Node, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    running: dict[str, Placement] = field(default_factory=dict)
    _refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    _usable: list[Node] = field(default_factory=list)

    def look(self, nodes: tuple[Node, ...]) -> None:
        """Take note of the nodes that there are now; those newly left out are logged."""
        self.nodes = nodes
        self._usable, left_out = usable(nodes, own_versions(), self._refused)
        for host, why in left_out.items():
            if self.left_out.get(host) != why:
                log.warning("node left out: %s", why)
        self.left_out = left_out

    def refuse(self, task: str, said: str) -> None:
        """Take note that the worker of a task refused it: of a task on a GPU, this node's GPUs are left out."""
        placement = self.running.get(task)
        # A node that refuses even what needs no GPU is of no use at all, whatever it says then.
        if placement is not None and self._refused.get(placement.node, ("", ""))[0] != CPU:
            self._refused[placement.node] = (placement.device, said)

    def end(self, task: str) -> None:
        """Take note that a task has ended, or does not start after all."""
        self.running = ended(self.running, task)

    def has_room(self) -> bool:
        """Say whether any task could be claimed."""
        return has_room(self._usable, list(self.running.values()), self.in_flight - 1)

    def occupied(self) -> Resources:
        """Return what the tasks occupy that run or are queued on nodes."""
        places = self.running.values()
        return Resources(
            sum(each.cpus for each in places),
            sum(each.gpus for each in places),
            sum(each.memory_bytes for each in places),
        )

    def gpu_text(self) -> str:
        """Return the GPUs that may be used, for people."""
        found = [f"{node.host}: {node.gpus} x {node.gpu_type or 'unknown'}" for node in self._usable if node.gpus]
        return ", ".join(found) or "none"

    def picker(self, most: int) -> ClaimPicker:
        """Return what decides about one claim, of so many tasks at most."""
        return ClaimPicker(self, most)

    def document(self) -> dict[str, Any]:
        """Return the nodes and what of them is in use, as JSON."""
        used = [placement for placement in self.running.values() if not placement.queued]
        nodes = []
        for node in self.nodes:
            here = [placement for placement in used if placement.node == node.id]
            on_gpu = [placement for placement in here if placement.device == CUDA]
            nodes.append(
                {
                    "node": node.host,
                    "cpus": node.cpus,
                    "cpus_used": sum(placement.cpus for placement in here),
                    "memory_bytes": node.memory_bytes,
                    "gpus": node.gpus,
                    "gpu_type": node.gpu_type,
                    "gpu_memory_bytes": node.gpu_memory_bytes,
                    "gpus_busy": len({slot for placement in on_gpu for slot in placement.slots}),
                    "gpu_share_used": round(sum(placement.gpus for placement in on_gpu), 4),
                    "tasks": len(here),
                    "gpu_tasks": len(on_gpu),
                    "left_out": self.left_out.get(node.host),
                }
            )
        return {"nodes": nodes}


class ClaimPicker:
    """Decides about one claim; see `orchestrator.db.picking.Picker`."""

    def __init__(self, places: Places, most: int) -> None:
        self._places, self._most = places, most
        self.placements: dict[str, Placement] = {}

    def gpus(self) -> tuple[float, Sequence[str]]:
        """Return the most GPUs of a node, and the types that there are."""
        nodes = self._places._usable
        types = sorted({node.gpu_type.casefold() for node in nodes if node.gpus and node.gpu_type})
        return float(max((node.gpus for node in nodes), default=0)), types

    def pick(self, candidates: Iterable[Candidate]) -> Mapping[str, Picked]:
        """Return the tasks that start now, and where."""
        places = self._places
        decision = place(
            places._usable,
            list(places.running.values()),
            candidates,
            learned=places.learned,
            queued_per_running=places.in_flight - 1,
            weight=places.pace.weight,
            most=self._most,
        )
        self.placements = dict(decision.placements)
        return {
            task: Picked(
                placement.host,
                placement.device,
                None if placement.device == CPU else placement.device_type,
                task in decision.pinned,
            )
            for task, placement in decision.placements.items()
        }

    def drop(self, task: str) -> None:
        """Forget a task that does not start after all."""
        self.placements.pop(task, None)
