"""Timing calls: in turn, so that load of other processes falls on all of them alike; on a GPU by CUDA events."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Call = Callable[[], object]

Time = TypeVar("Time")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Milliseconds of one call: of the thread's CPU, which do not count waiting for a processor, and of the clock."""

    cpu_ms: float
    wall_ms: float


def cpu_time(call: Call) -> CpuTime:
    """Time one call on the CPU."""
    cpu, wall = time.thread_time(), time.perf_counter()
    call()
    return CpuTime(1000 * (time.thread_time() - cpu), 1000 * (time.perf_counter() - wall))


def wall_ms(call: Call) -> float:
    """Return the milliseconds of one call by the clock."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def cuda_ms(call: Call) -> float:
    """Return the milliseconds between CUDA events around one call, waiting for its end."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    elapsed: float = start.elapsed_time(stop)
    return elapsed


def idle_cuda_ms(call: Call) -> float:
    """Do the same from an idle device."""
    torch.cuda.synchronize()
    return cuda_ms(call)


def take_turns(
    calls: Mapping[str, Call], repeats: int, timed: Callable[[Call], Time], *, progress: bool = False
) -> dict[str, list[Time]]:
    """Time every call in turn, `repeats` times, after one of each that is not counted.

    Parameters
    ----------
    timed
        Makes one call and returns what it took.
    progress
        Say on stderr when a call has been made for the first time, which may compile it.
    """
    seen: dict[str, list[Time]] = {name: [] for name in calls}
    for name, call in calls.items():
        call()
        if progress:
            print(f"{name}: warm", file=sys.stderr)
    for _ in range(repeats):
        for name, call in calls.items():
            seen[name].append(timed(call))
    return seen
