"""Which nodes a Ray cluster has: each is asked once, on itself, what software and GPUs it has. Runs in the driver."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.errors import describe
from workers.execution.cluster import LOGICAL_GPU_GIB, Node, own_versions
from workers.execution.local import python_path

_GIB = 2**30
_PROBE_SECONDS = 120.0
_GPU_TYPE_LABEL = "ray.io/accelerator-type"
#: As long as a recipe's `gpu_type` may be.
_TYPE_CHARACTERS = 63
_NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
_CUDA = """
import json, torch
seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
first = torch.cuda.get_device_properties(0) if seen else None
print(json.dumps({"seen": seen, "name": first and first.name, "memory": first and first.total_memory}))
"""


def probe_node(gpus: int) -> str:
    """Say what this node is made of, as JSON; `gpus` is how many Ray gives out there.

    torch is asked in a process of its own that sees what Ray's own processes were given, as a task without a GPU sees
    none.
    """
    found: dict[str, Any] = {"versions": dict(own_versions()), "by_number": os.environ.get(_NOSET) == "1"}
    logical = os.environ.get(LOGICAL_GPU_GIB)
    if gpus and logical:
        found |= {"cuda_ok": True, "gpu_memory_bytes": int(float(logical) * _GIB)}
    elif gpus:
        found |= _ask_torch()
    return json.dumps(found)


def _ask_torch() -> dict[str, Any]:
    environment = _first_environment() | {"PYTHONPATH": python_path()}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CUDA],
            capture_output=True,
            text=True,
            env=environment,
            timeout=_PROBE_SECONDS,
            check=True,
        )
        seen = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):
        return {"cuda_ok": False}
    return {"cuda_ok": seen["seen"] > 0, "gpu_memory_bytes": seen["memory"] or 0, "gpu_type": seen["name"]}


def _first_environment() -> dict[str, str]:
    """Return the environment that this process was started with, before Ray hid the GPUs from it."""
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    started = Path("/proc/self/environ")
    if started.is_file():
        for line in started.read_text(errors="replace").split("\0"):
            name, equals, value = line.partition("=")
            if equals and name == "CUDA_VISIBLE_DEVICES" and value:
                environment[name] = value
    return environment


class ClusterWatch:
    """The nodes of the cluster that this process is connected to."""

    def __init__(self, *, local: bool) -> None:
        """Watch; a `local` Ray is this machine, which is asked without Ray."""
        self._local = local
        self._probe = ray.remote(max_retries=0)(probe_node)
        self._asked: dict[str, Any] = {}
        self._known: dict[str, Mapping[str, Any]] = {}
        self._nodes: dict[str, Node] = {}

    @property
    def size(self) -> int:
        """How many nodes take tasks."""
        return len(self._nodes)

    def node(self, node: str) -> Node | None:
        """Return a node by its id; None if it is not there."""
        return self._nodes.get(node)

    def look(self) -> list[Node]:
        """Return the nodes that are alive and have answered; at the start, wait for the first that does."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for node, data in alive.items():
            if node not in self._known and node not in self._asked:
                self._ask(node, int(data["Resources"].get("GPU", 0)))
        for known in (self._asked, self._known):
            for gone in known.keys() - alive.keys():
                known.pop(gone)
        while True:
            self._take_answers(wait=bool(self._asked) and not self._known)
            if self._known or not self._asked:
                break
        self._nodes = _with_own_names([_node(alive[node], found) for node, found in self._known.items()])
        return list(self._nodes.values())

    def _ask(self, node: str, gpus: int) -> None:
        if self._local:
            self._known[node] = json.loads(probe_node(gpus))
            return
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        self._asked[node] = self._probe.options(num_cpus=0, scheduling_strategy=strategy).remote(gpus)

    def _take_answers(self, *, wait: bool) -> None:
        if not self._asked:
            return
        by_reference = {reference: node for node, reference in self._asked.items()}
        ready, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=1.0 if wait else 0.2)
        for reference in ready:
            node = by_reference[reference]
            del self._asked[node]
            try:
                self._known[node] = json.loads(ray.get(reference))
            except RayError as error:
                # Such as a node that has no Quantmill, or another one.
                self._known[node] = {"problem": f"got {describe(error)[:300]}, wanted a node that runs tasks"}


def _node(data: Mapping[str, Any], found: Mapping[str, Any]) -> Node:
    resources, labels = data["Resources"], data.get("Labels") or {}
    host = data["NodeManagerHostname"]
    problem = found.get("problem", "")
    return Node(
        id=data["NodeID"],
        host=host,
        cpus=resources.get("CPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        gpus=int(resources.get("GPU", 0)),
        gpu_memory_bytes=found.get("gpu_memory_bytes", 0),
        gpu_type=gpu_type_name(labels.get(_GPU_TYPE_LABEL) or found.get("gpu_type") or "") or None,
        versions=found.get("versions", {}),
        cuda_ok=found.get("cuda_ok", False),
        problem=problem and f"{host}: {problem}",
        by_number=found.get("by_number", False),
    )


def gpu_type_name(said: str) -> str:
    """Return what a GPU is called as a user can ask for it: "NVIDIA-L40S" for torch's "NVIDIA L40S"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", said).strip("._-")[:_TYPE_CHARACTERS]


def _with_own_names(nodes: list[Node]) -> dict[str, Node]:
    """Tell nodes of one machine apart by their ids."""
    hosts = [node.host for node in nodes]
    named = [replace(node, host=f"{node.host}/{node.id[:6]}") if hosts.count(node.host) > 1 else node for node in nodes]
    return {node.id: node for node in named}
