"""What a cluster is made of, as the executor reports it, and which software a node must have to take tasks."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, Self

#: Packages whose versions decide what a task gives.
PACKAGES = ("quantmill", "torch", "diffusers")
#: In a node's environment: its GPUs are logical, so many GiB each, and tasks that get one compute on the CPU. For
#: drills of placement on machines without GPUs.
LOGICAL_GPU_GIB = "QUANTMILL_LOGICAL_GPU_GIB"
CPU, CUDA = "cpu", "cuda"
#: What a process takes of a GPU before it computes anything: its CUDA context, workspaces of cuBLAS and cuDNN.
CUDA_CONTEXT_BYTES = int(0.6 * 2**30)
#: Memory is asked for and given out in steps of at least this: tasks of nearly the same size are taken for the same.
MEMORY_STEP = 256 << 20
_STEPS = 16


def in_steps(memory_bytes: float) -> int:
    """Return an amount of memory rounded up: to 256 MiB, and above 4 GiB to a sixteenth of the next power of two.

    So all amounts up to 1 TiB are 80 different ones, and none grows by more than an eighth beyond the first step.
    """
    step = max(MEMORY_STEP, (1 << (math.ceil(memory_bytes) - 1).bit_length()) // _STEPS) if memory_bytes > 0 else 1
    return math.ceil(memory_bytes / step) * step


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a cluster.

    Attributes
    ----------
    id
        Ray's; "" for the only one.
    host
        Its name, for people; different for each node of a cluster.
    cpus, memory_bytes
        What tasks may occupy.
    gpus, gpu_memory_bytes, gpu_type
        How many it has, bytes of one, and what it is called; bytes are 0 where they are not known.
    versions
        Of `PACKAGES` there; empty if not known, which is taken for right.
    cuda_ok
        torch sees a CUDA device there.
    problem
        Why it cannot be used at all, found on the node itself; "" if it can.
    by_number
        Its workers see all its GPUs and are told the number of theirs, so that one process may use one after another.
    """

    id: str
    host: str
    cpus: float
    memory_bytes: int
    gpus: int = 0
    gpu_memory_bytes: int = 0
    gpu_type: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    cuda_ok: bool = False
    problem: str = ""
    by_number: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(**data)


@cache
def own_versions() -> Mapping[str, str]:
    """Return the versions of `PACKAGES` in this Python, without those of a build ("2.13.0", not "2.13.0+cu130").

    Nothing is imported for it. A package that is not installed, such as this one in a bare source tree, is "none".
    """
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "none"


def version_problem(found: Mapping[str, str], wanted: Mapping[str, str], where: str) -> str:
    """Say in a line how versions differ from those wanted; "" if they do not, or one side is not known."""
    differ = [name for name in wanted if name in found and found[name] != wanted[name]]
    if not differ:
        return ""
    got = ", ".join(f"{name} {found[name]}" for name in differ)
    return (
        f"{where}: got {got}, wanted {', '.join(f'{name} {wanted[name]}' for name in differ)}, as the orchestrator has"
    )


def host_name() -> str:
    """Return the name of this machine."""
    return platform.node() or "localhost"
