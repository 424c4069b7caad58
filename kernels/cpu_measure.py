"""Which of a layer's products is faster on this CPU, timed when a model is loaded for "auto".

A layer that is small enough has two exact ones: our own, in one call with what surrounds it (`kernels.cpu_call`), and
oneDNN's. Both add up the same integers; in float32 their outputs differ by `kernels.cpu.CONV_TOLERANCE` at most. The
fixed rule takes our own up to `SMALL_WORK` products. Here both are timed on the layer's own weight, for images of a few
sizes, beside PyTorch's float32 operator; the rule is left only where the other one took less by CLEAR, so that what
runs seldom depends on the clock, and is the same for all layers of a shape in a process. Where PyTorch is told to be
deterministic (`torch.use_deterministic_algorithms`), and for the backend "cpu", nothing is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native
from kernels.activations import ActivationTable
from kernels.conv import ConvGeometry
from kernels.cpu import cpu_conv2d, cpu_linear
from kernels.cpu_activation import CpuGrid, cpu_grid, quantize_cpu
from kernels.cpu_call import SmallCalls
from kernels.cpu_float import FloatWeight, float_product, quantized_values
from kernels.cpu_weight import ANY_WORK, CpuWeight
from kernels.epilogue import Epilogue
from kernels.errors import KernelError

# Images' sides, whose pixels are rows of a Linear too.
SIDES = (8, 16, 32)
# How much less time the other product has to take.
CLEAR = 0.85
# Of a float32 operator's time, what a layer's integers may take; and how much less floats have to take then.
BOUND, FLOATS_CLEAR = 1.1, 0.95
# Seconds of a call after which larger images are not tried, of one shape of weight, and of all in a process.
CALL_LIMIT, SHAPE_LIMIT, TOTAL_LIMIT = 0.004, 0.03, 2.0
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: of our own product, of oneDNN's (None where it is not exact), of a float32 operator's.

    `unpacked` is of quantization and that operator on an unpacked weight, timed where integers were beyond BOUND.
    """

    rows: int
    work: int
    own: float
    other: float | None
    floats: float
    unpacked: float | None = None

    @property
    def best(self) -> float:
        """Return the faster product's."""
        return self.own if self.other is None else min(self.own, self.other)

    @property
    def is_too_slow(self) -> bool:
        """Whether integers are beyond BOUND, and floats faster."""
        is_beyond = self.best > BOUND * self.floats
        return is_beyond and self.unpacked is not None and self.unpacked < FLOATS_CLEAR * self.best


@dataclass(slots=True)
class Timings:
    """What was timed in a process, by shape of weight and number of threads, and the seconds it took."""

    known: dict[Hashable, tuple[Timing, ...]] = field(default_factory=dict)
    spent: float = 0.0


@functools.cache
def process_timings() -> Timings:
    """Return what this process has timed."""
    return Timings()


def measured(weight: CpuWeight, cache: Timings) -> tuple[CpuWeight, str]:
    """Return a weight with the products up to which its own is taken as they were timed, and what was found.

    Parameters
    ----------
    weight : CpuWeight
    cache : Timings
        Read and added to.

    Returns
    -------
    CpuWeight, str
        The weight as it is and "" where there is nothing to choose, PyTorch is to be deterministic, or time is up.
    """
    if weight.small is None or not native.is_usable() or torch.are_deterministic_algorithms_enabled():
        return weight, ""
    key = shape_key(weight)
    if key not in cache.known:
        if cache.spent >= TOTAL_LIMIT:
            return weight, ""
        start = time.perf_counter()
        cache.known[key] = _timings(weight)
        cache.spent += time.perf_counter() - start
    found = cache.known[key]
    if not found:
        return weight, ""
    limit = weight.small_work if weight.packed is None else chosen_work(found, weight.small_work)
    return replace(weight, small_work=limit), _said(found, limit)


def shape_key(weight: CpuWeight) -> Hashable:
    """Return what weights have in common that are timed once."""
    sizes, threads = (weight.outputs, weight.channels, weight.geometry), torch.get_num_threads()
    return (*sizes, weight.packed is None, weight.small is None or weight.small.zero is None, threads)


def why_unpack(weight: CpuWeight, cache: Timings) -> str:
    """Say why a weight that was timed is better unpacked to floats; "" if it is not."""
    found = cache.known.get(shape_key(weight), ())
    if not found or not all(timing.is_too_slow for timing in found):
        return ""
    times = ", ".join(f"{each.best / each.floats:.2f} of float32 at {each.rows} rows" for each in found)
    return f"integers measured {times}"


def chosen_work(timings: tuple[Timing, ...], rule: int) -> int:
    """Return up to how many products a weight's own is taken.

    Parameters
    ----------
    timings : tuple of Timing
        Of rising work.
    rule : int
        What it is where times are near each other.
    """
    own = [
        timing.other is None
        or (timing.own <= timing.other / CLEAR if timing.work <= rule else timing.own < timing.other * CLEAR)
        for timing in timings
    ]
    first = own.index(False) if False in own else len(own)
    if first == len(own):
        return max(rule, timings[-1].work if timings else rule)
    if first == 0:
        return min(rule, timings[0].work - 1)
    # Between the largest that was faster and the smallest that was not; the rule, if it lies there.
    return min(max(rule, timings[first - 1].work), timings[first].work - 1)


def _timings(weight: CpuWeight) -> tuple[Timing, ...]:
    """Time a weight's products on noise, for images of rising size."""
    assert weight.small is not None
    grid = cpu_grid(ActivationTable(torch.tensor([0.02]), torch.tensor([117.0]), 8))
    alone, calls = replace(weight, small=None), SmallCalls(replace(weight, small_work=ANY_WORK), None, 8)
    shape = (weight.outputs, weight.channels, *(() if weight.geometry is None else weight.geometry.kernel))
    floats = torch.full(shape, 0.01)
    if weight.geometry is not None:
        floats = floats.contiguous(memory_format=torch.channels_last)
    start, found = time.perf_counter(), []
    for side in SIDES:
        try:
            down, across = (side, side) if weight.geometry is None else weight.geometry.output_size(side, side)
        except KernelError:  # an image that the kernel does not fit in
            continue
        rows = down * across
        x = torch.randn((rows, weight.channels) if weight.geometry is None else (1, side, side, weight.channels))
        own = _seconds(lambda x=x: calls(x, grid, None))  # type: ignore[misc]
        other = None if weight.packed is None else _seconds(lambda x=x: _in_several(x, alone, grid))  # type: ignore[misc]
        plain = _seconds(lambda x=x: _float_layer(x, floats, weight.geometry))  # type: ignore[misc]
        timing = Timing(rows, rows * weight.small.values.numel(), own, other, plain)
        if timing.best > BOUND * plain:
            timing = replace(timing, unpacked=_seconds(lambda x=x: _unpacked_layer(x, floats, weight, grid)))  # type: ignore[misc]
        found.append(timing)
        if max(own, other or 0.0) > CALL_LIMIT or time.perf_counter() - start > SHAPE_LIMIT:
            break
    return tuple(found)


def _in_several(x: Tensor, weight: CpuWeight, grid: CpuGrid) -> Tensor:
    """Quantize and multiply by oneDNN."""
    padding = (0, 0) if weight.geometry is None else weight.geometry.padding
    codes = quantize_cpu(x, grid, 8, with_sums=weight.correction is not None, padding=padding)
    return (cpu_linear if weight.geometry is None else cpu_conv2d)(codes, weight, Epilogue())


def _float_layer(x: Tensor, weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """What a float model computes."""
    if geometry is None:
        return F.linear(x, weight)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, None, geometry.stride, geometry.padding, geometry.dilation)


def _unpacked_layer(x: Tensor, floats: Tensor, weight: CpuWeight, grid: CpuGrid) -> Tensor:
    """Quantize, and multiply what codes stand for."""
    return float_product(quantized_values(x, grid, 8), FloatWeight(floats, weight.geometry), Epilogue())


def _seconds(call: Callable[[], object]) -> float:
    """Return the least seconds of a few calls, after one that prepares what the next ones use.

    Of one thread they are the processor's, which waiting for it does not count in.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    least = float("inf")
    for _ in range(_REPEATS):
        start = clock()
        call()
        least = min(least, clock() - start)
    return least


def _said(timings: tuple[Timing, ...], limit: int) -> str:
    """Say how a layer was timed: its time of a float32 operator's, for each number of rows."""
    times = ", ".join(
        f"{(each.own if each.work <= limit or each.other is None else each.other) / each.floats:.2f} of float32 at "
        f"{each.rows} rows" for each in timings
    )  # fmt: skip
    most = max((each.rows for each in timings if each.work <= limit), default=0)
    one = "" if limit == ANY_WORK else f", one call up to {most} rows" if most < timings[-1].rows else ", one call"
    return f"measured {times}{one}"
