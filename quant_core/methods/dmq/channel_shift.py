"""Powers of two that refine the quantization steps of input channels, by a vote of the samples (DMQ, Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.observe import VALUES_PER_STEP, StepRanges
from quant_core.nn.ranges import QParams
from quant_spec.enums import ActivationMode, RangeMethod, Shift
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec
from quant_spec.passes.scale import Scale
from quant_spec.ranges import RangeSpec

_SMALL = 1e-12


def choose_shifts(
    spec: LayerSpec, stats: ChannelStats, channel_scale: Tensor, ranges: RangeSpec, config: Scale
) -> Tensor | None:
    """Return the exponents of a layer's channels at each step (one row if static), shape (S, C_in), or None."""
    if not stats.positions:
        return None
    low, high = stats.low / channel_scale, stats.high / channel_scale
    if config.shift is Shift.VARIANCE:
        width = high.clamp(min=0) - low.clamp(max=0)
        spread = width.std(1, correction=0) / width.mean(1).clamp(min=_SMALL)
        if float(spread.mean()) < config.least_spread:
            return None
    activation = spec.activation
    assert activation is not None
    samples = [stats.samples(step) / channel_scale for step in range(stats.steps)]
    least, most, count = low, high, stats.count
    if activation.mode is ActivationMode.STATIC:
        samples, count = [torch.cat(samples)], count.sum()[None]
        least, most = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    sizes = spec.split or (len(channel_scale),)
    rows, first = [], 0
    for size in sizes:
        own = slice(first, first + size)
        parts = [x[..., own] for x in samples]
        grid = _base_grid(activation, ranges, low[:, own], high[:, own], parts)
        bits = activation.step_bits or (activation.bits,) * len(samples)
        seen_of_steps = [Extremes(*each) for each in zip(least[:, own], most[:, own], count, strict=True)]
        rows.append(
            torch.stack(
                [
                    vote(x, QParams(grid.scale[t], grid.zero_point[t]), 2 ** bits[t] - 1, config.consensus, seen)
                    for t, (x, seen) in enumerate(zip(parts, seen_of_steps, strict=True))
                ]
            )
        )
        first += size
    return torch.cat(rows, dim=1)


def _base_grid(
    spec: ActivationSpec, ranges: RangeSpec, low: Tensor, high: Tensor, samples: Sequence[Tensor]
) -> QParams:
    """Return the grids that a part of the input has without shifts, tables of shape (S,) or (1,)."""
    seen = StepRanges(len(low), ranges.method is not RangeMethod.MINMAX)
    seen.low, seen.high = low.amin(1), high.amax(1)
    if seen.keep_values:
        per = max(1, VALUES_PER_STEP * len(low) // len(samples))
        for step, x in enumerate(samples):
            flat = x.flatten()
            seen.values[step].append(flat[:: max(1, len(flat) // per)])
    return seen.qparams(spec, ranges)


@dataclass(frozen=True, slots=True)
class Extremes:
    """Least and greatest value of each channel at a step, shape (C,), and how many values were seen, shape ()."""

    low: Tensor
    high: Tensor
    count: Tensor

    def clipped(self, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        """Return what clipping these two alone adds to the mean squared error, shape (C,)."""
        above = (self.high - (top - zero_point) * scale).clamp(min=0)
        below = (-zero_point * scale - self.low).clamp(min=0)
        return (above.square() + below.square()) / self.count


def vote(samples: Tensor, grid: QParams, top: int, consensus: float, extremes: Extremes | None = None) -> Tensor:
    """Choose each channel's exponent (Algorithm 1), SHIFT_DEPTH where samples do not agree.

    And where, over all samples, the error would not fall.

    Parameters
    ----------
    samples : Tensor, shape (N, positions, C)
        Of one trajectory step.
    grid : QParams, shape ()
        That without shifts; exponent d makes its step scale * 2**(d - SHIFT_DEPTH), about the same zero point.
    top : int
        Greatest code.
    consensus : float
        Share of the samples that must prefer the same exponent.
    extremes : Extremes, optional
        Of what was seen beside `samples`.

    Returns
    -------
    Tensor, shape (C,), dtype uint8
    """
    steps = [grid.scale * 2.0 ** (d - SHIFT_DEPTH) for d in range(SHIFT_DEPTH, -1, -1)]
    errors = torch.stack(
        [(samples - fake_quantize_affine(samples, s, grid.zero_point, 0, top)).square().mean(dim=1) for s in steps]
    )  # (exponents, N, C); the first of equal errors wins, so the coarser step
    preferred = errors.argmin(dim=0)
    votes = nn.functional.one_hot(preferred, SHIFT_DEPTH + 1).sum(dim=0)  # (C, exponents)
    most, place = votes.max(dim=1)
    agreed = most >= consensus * len(samples)
    total = errors.mean(dim=1)
    if extremes is not None:
        total = total + torch.stack([extremes.clipped(s, grid.zero_point, top) for s in steps])
    gains = total.gather(0, place[None])[0] < total[0]
    return torch.where(agreed & gains, SHIFT_DEPTH - place, SHIFT_DEPTH).to(torch.uint8)
