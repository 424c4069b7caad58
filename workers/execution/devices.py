"""The device of one task: taken, watched and given back; torch is imported only where a GPU is asked for."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import RefusedError
from workers.execution.cluster import CPU, CUDA, LOGICAL_GPU_GIB

#: What cuBLAS needs from the start of a process to give the same bits each time.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


@dataclass(frozen=True, slots=True)
class TaskDevice:
    """What a task computes on: torch's name of it, and its type ("cpu", or what the GPU is called)."""

    name: str
    type: str


def _torch() -> Any:
    """Import torch where a task needs it; the orchestrator, which reads this module too, never does."""
    return importlib.import_module("torch")


def device_number(given: Sequence[int | str], environ: Mapping[str, str]) -> int:
    """Return torch's number of the first GPU that Ray gave a task.

    Ray names GPUs as `CUDA_VISIBLE_DEVICES` does, where that is set; torch counts what is visible.
    """
    visible = [each.strip() for each in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    first = str(given[0]) if given else "0"
    if visible:
        return visible.index(first) if first in visible else 0
    return int(first)


def take_device(name: str, gpu_type: str | None, host: str) -> TaskDevice:
    """Make a device the current one of this process.

    Parameters
    ----------
    name
        "cpu", "cuda" or "cuda:N".
    gpu_type
        What the cluster calls that GPU; by default, what torch calls it.
    host
        Name of this node, for people.

    Raises
    ------
    RefusedError
        If it is CUDA's, and torch sees no such device.
    """
    if not name.startswith(CUDA):
        return TaskDevice(name, CPU)
    if os.environ.get(LOGICAL_GPU_GIB):
        return TaskDevice(CPU, gpu_type or CUDA)
    os.environ.setdefault(*_CUBLAS)
    torch = _torch()

    number = int(name.partition(":")[2] or 0)
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= seen:
        build = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
        raise RefusedError(f"{host}: got {seen} CUDA devices from {build}, wanted device {number}, which Ray gave")
    torch.cuda.set_device(number)
    return TaskDevice(CUDA, gpu_type or torch.cuda.get_device_name(number))


def reset_peaks(device: TaskDevice) -> None:
    """Begin to watch the most memory that is held."""
    with suppress(OSError):  # not Linux, or no right to: the peak is then that of the whole process
        _CLEAR.write_text(_CLEAR_PEAK)
    torch = sys.modules.get("torch")
    if torch is not None and device.name.startswith(CUDA):
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)


def read_peaks(device: TaskDevice) -> dict[str, Any]:
    """Return the most bytes held since `reset_peaks`: `peak_rss_bytes` by this process, `peak_gpu_bytes` by torch."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and device.name.startswith(CUDA)
    return {
        "peak_rss_bytes": _peak_rss_bytes(),
        "peak_gpu_bytes": _peak_gpu_bytes(torch) if on_gpu else 0,
    }


def _peak_gpu_bytes(torch: Any) -> int:
    """Return the most that torch has held on all devices."""
    return sum(int(torch.cuda.max_memory_allocated(number)) for number in range(torch.cuda.device_count()))


def _peak_rss_bytes() -> int:
    """Return the most memory that this process has held since it was reset, in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def free_gpu() -> None:
    """Give cached GPU memory back, as other workers may share the GPU before this process runs its next task."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use its deterministic algorithms alone, and restore what was set; nothing if not `wanted`."""
    if not wanted:
        yield
        return
    os.environ.setdefault(*_CUBLAS)
    torch = _torch()

    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
