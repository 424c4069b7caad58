"""Which product of E4M3 numbers is faster on this GPU, timed when a model is loaded for "auto": ours or PyTorch's.

`torch._scaled_mm` (cuBLAS, CUTLASS) takes the same numbers and the same scales, of rows and of output channels, adds
them up as exactly (`use_fast_accum=False`) and writes bfloat16. Both are timed on the layer's own shape for a few
numbers of rows, in CUDA graphs, so that the host's part does not count. Where PyTorch is told to be deterministic
(`torch.use_deterministic_algorithms`), and for the backend "triton", nothing is timed and our own runs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.cuda_graph import captured
from kernels.epilogue import Epilogue
from kernels.fp8 import FP8, Fp8Matrix, library_takes, linear_fp8, linear_fp8_library
from quant_spec.enums import KernelBackend

# Rows of a call: a sample's tokens, to a batch's.
ROWS = (256, 1024, 4096, 16384)
# How much less time PyTorch's product has to take.
CLEAR = 0.95
# Seconds that all shapes of a process may take, kernels that are compiled meanwhile included.
TOTAL_LIMIT = 15.0
_CALLS, _REPEATS = 10, 3


@dataclass(frozen=True, slots=True)
class Fp8Timing:
    """Seconds of one call with `rows` rows: of our own product, and of PyTorch's."""

    rows: int
    own: float
    library: float


@dataclass(slots=True)
class Fp8Timings:
    """What was timed in a process, by shape and device, and the seconds it took."""

    known: dict[Hashable, tuple[Fp8Timing, ...]] = field(default_factory=dict)
    spent: float = 0.0


@functools.cache
def process_fp8_timings() -> Fp8Timings:
    """Return what this process has timed."""
    return Fp8Timings()


def measured_fp8(weight: Fp8Matrix, dtype: torch.dtype, cache: Fp8Timings) -> tuple[Fp8Matrix, str]:
    """Return a weight with the rows for which PyTorch's product is taken as they were timed, and what was found.

    Parameters
    ----------
    weight : Fp8Matrix
        Of shape (N, K).
    dtype : torch.dtype
        Of the outputs.
    cache : Fp8Timings
        Read and added to.

    Returns
    -------
    Fp8Matrix, str
        The weight as it is and "" where PyTorch's product does not take it, it is not on a GPU, PyTorch is to be
        deterministic, or time is up.
    """
    device = weight.values.device
    is_fixed = device.type != "cuda" or torch.are_deterministic_algorithms_enabled()
    if is_fixed or not library_takes(weight, Epilogue(dtype)):
        return weight, ""
    key = (tuple(weight.values.shape), device)
    if key not in cache.known:
        if cache.spent >= TOTAL_LIMIT:
            return weight, ""
        start = time.perf_counter()
        with torch.cuda.device(device):
            cache.known[key] = fp8_timings(weight, dtype, ROWS, graph_seconds)
        cache.spent += time.perf_counter() - start
    return chosen_fp8(weight, cache.known[key])


def fp8_timings(
    weight: Fp8Matrix, dtype: torch.dtype, rows: tuple[int, ...], seconds: Callable[[Callable[[], Tensor]], float]
) -> tuple[Fp8Timing, ...]:
    """Time both products of a weight; none where PyTorch has no such product here, or there is no memory to time in."""
    found, epilogue = [], Epilogue(dtype)
    for count in rows:
        try:
            x = torch.randn(count, weight.values.shape[1], device=weight.values.device).to(FP8)
            given = Fp8Matrix(x, torch.full((count,), 0.01, device=x.device))
            linear_fp8_library(given, weight, epilogue)
        except RuntimeError:  # PyTorch names no error of its own for what a device lacks
            return ()
        own = seconds(lambda given=given: linear_fp8(given, weight, epilogue, KernelBackend.TRITON))  # type: ignore[misc]
        library = seconds(lambda given=given: linear_fp8_library(given, weight, epilogue))  # type: ignore[misc]
        found.append(Fp8Timing(count, own, library))
    return tuple(found)


def chosen_fp8(weight: Fp8Matrix, timings: tuple[Fp8Timing, ...]) -> tuple[Fp8Matrix, str]:
    """Return a weight with what timings of rising rows say, and that in words; as it is and "" if there are none."""
    if not timings:
        return weight, ""
    switches: list[int] = []
    last = False
    for i, timing in enumerate(timings):
        is_faster = timing.library < CLEAR * timing.own
        if is_faster is not last:
            switches.append(0 if i == 0 else math.isqrt(timings[i - 1].rows * timing.rows))
        last = is_faster
    times = ", ".join(f"{each.library / each.own:.2f} at {each.rows} rows" for each in timings)
    return replace(weight, switches=tuple(switches)), f"torch._scaled_mm measured {times} of ours, {_taken(switches)}"


def _taken(switches: list[int]) -> str:
    """Say for which rows PyTorch's product is taken."""
    ends: list[int | None] = [*switches[1::2], None]
    ranges = [
        ("throughout" if not start else f"from {start} rows") if stop is None else f"from {start} to {stop - 1} rows"
        for start, stop in zip(switches[::2], ends, strict=False)
    ]
    return f"taken {' and '.join(ranges)}" if ranges else "not taken"


def graph_seconds(call: Callable[[], Tensor]) -> float:
    """Return the seconds of one call on a GPU, of ten in a CUDA graph; the least of three replays counts."""

    def several() -> Tensor:
        for _ in range(_CALLS - 1):
            call()
        return call()

    replay = captured(several)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    least = float("inf")
    for _ in range(_REPEATS):
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        least = min(least, start.elapsed_time(stop) / 1000 / _CALLS)
    return least
