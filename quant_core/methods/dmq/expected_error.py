"""The error that quantization is expected to leave at a layer's output, as a function of its input channels' scales.

Channel k of the input is divided by tau_k, in code its `channel_scale`, and its weight multiplied. At trajectory step
t, output channels added up:

    L_t(tau) = sum_k  s_t(tau)^2 / 12  tau_k^2 |W_k|^2   +   sum_jk  s_jk(tau)^2 / 12  d_k / tau_k^2  r_tk

The first sum is the activation's rounding error, the second the weight's. s_t is the step of the activation grid at
step t, min-max of x / tau over the calibration set at that step (searched ranges are a little narrower). As dividing
commutes with a channel's minimum and maximum, it is the greatest of high_tk / tau_k less the least of low_tk / tau_k:
differentiable and exact. s_jk is the step of the weight's grid. d_k is how much of column k is left for rounding to
spoil: E[x_k^2] if weights are rounded to nearest; in closed form, the variance given the columns that are rounded after
it, which can make up for it. r_tk is E[x_k^2] at step t, over its mean. Both tensors' rounding errors count as uniform
and independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.closed_form import damped
from quant_core.fit.layer_rounding import weight_grid
from quant_core.nn.layers import weight_groups, weight_matrix
from quant_spec.enums import ActivationMode, Granularity
from quant_spec.formats import LayerSpec
from quant_spec.ranges import RangeSpec

_SMALL = 1e-12


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """What the expected error of one layer depends on.

    Attributes
    ----------
    spec : LayerSpec
        With an activation.
    weight : Tensor, shape (C_out, K), dtype float32
        K in the order (taps, C_in).
    low, high, moment : Tensor, shape (S, C_in), dtype float32
        Extremes and E[x_k^2] of the input's channels at each trajectory step.
    free : Tensor, shape (K,), dtype float32
        d_k.
    shrink : Tensor, shape (C_out, G) or (1, 1), dtype float32
        Step of the weight's grid, over its min-max step.
    groups : Tensor, shape (G, n), dtype int64
        Columns that share a step; K stands for none.
    """

    spec: LayerSpec
    weight: Tensor
    low: Tensor
    high: Tensor
    moment: Tensor
    free: Tensor
    shrink: Tensor
    groups: Tensor

    @property
    def channels(self) -> int:
        """Input channels."""
        return self.low.shape[1]

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.weight.shape[1] // self.channels


def make_problem(spec: LayerSpec, weight: Tensor, ranges: RangeSpec, stats: ChannelStats, free: Tensor) -> LayerProblem:
    """Collect what the expected error of a layer with `weight` (C_out, C_in, *kernel) depends on.

    Extremes are those of all rows in `stats`, as of the ranges that are deployed.
    """
    matrix = weight_matrix(weight.float()).cpu()
    index = weight_groups(tuple(weight.shape), spec)
    grid = weight_grid(matrix, spec, index, ranges)
    groups = _padded_groups(index)
    symmetric = spec.weight.symmetric
    plain = _grid_steps(matrix, groups, spec.weight.bits, spec.weight.granularity, symmetric=symmetric)
    shrink = (grid.scale / plain.clamp(min=_SMALL)).clamp(max=1)
    return LayerProblem(spec, matrix, stats.low, stats.high, stats.second_moment(), free, shrink, groups)


def free_variance(hessian: Tensor, damping: float) -> Tensor:
    """Return what is left of each column's variance for closed-form rounding to spoil, shape (K,).

    Columns that are rounded later make up for the rest: the pivots of a Cholesky factorization in reverse order.
    """
    h = damped(hessian, damping)
    order = torch.argsort(h.diagonal(), descending=True).flip(0)  # the last that is rounded comes first
    free = torch.empty(len(h))
    free[order] = torch.linalg.cholesky(h[order][:, order]).diagonal().square()
    return free


def _padded_groups(index: Tensor) -> Tensor:
    """Return the columns of each group, shape (G, n), the shorter ones filled up with K."""
    members = [torch.nonzero(index == group).flatten() for group in range(int(index.max()) + 1)]
    return nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=len(index))


def _grid_steps(matrix: Tensor, groups: Tensor, bits: int, granularity: Granularity, *, symmetric: bool) -> Tensor:
    """Return the min-max steps of a weight's grids, shape (C_out, G) or (1, 1), differentiable."""
    padded = torch.cat([matrix, matrix.new_zeros(len(matrix), 1)], dim=1)[:, groups]  # zero is in every range
    dims = (0, 2) if granularity is Granularity.PER_TENSOR else (2,)
    low, high = padded.amin(dims).reshape(-1, len(groups)), padded.amax(dims).reshape(-1, len(groups))
    return _steps(low, high, bits, symmetric=symmetric)


def _steps(low: Tensor, high: Tensor, bits: int | Tensor, *, symmetric: bool) -> Tensor:
    """Return the steps of grids over [low, high] and 0 (`quant_core.nn.ranges.qparams_from_range`)."""
    low, high, levels = low.clamp(max=0), high.clamp(min=0), 2**bits - 1
    return torch.maximum(-low, high) / (levels // 2) if symmetric else (high - low) / levels


def activation_noise(problem: LayerProblem, channel_scale: Tensor) -> Tensor:
    """Return the expected error power that rounding the activation leaves at the output, shape (S,)."""
    spec = problem.spec.activation
    assert spec is not None
    bits = torch.tensor(spec.step_bits) if spec.step_bits else spec.bits
    weighed = channel_scale.square() * problem.weight.square().sum(0).reshape(problem.taps, -1).sum(0)
    total = torch.zeros(len(problem.low))
    sizes = problem.spec.split or (problem.channels,)
    parts = (
        (problem.low / channel_scale).split(sizes, 1),
        (problem.high / channel_scale).split(sizes, 1),
        weighed.split(sizes),
    )
    for lows, highs, power in zip(*parts, strict=True):
        low, high = lows.amin(1), highs.amax(1)
        if spec.mode is ActivationMode.STATIC:
            low, high = low.min().expand_as(low), high.max().expand_as(high)
        total = total + _steps(low, high, bits, symmetric=spec.symmetric).square() / 12 * power.sum()
    return total


def weight_noise(problem: LayerProblem, channel_scale: Tensor) -> Tensor:
    """Return the expected error power that rounding the weight leaves at the output, shape (S,)."""
    spec = problem.spec.weight
    columns = channel_scale.repeat(problem.taps)
    steps = _grid_steps(problem.weight * columns, problem.groups, spec.bits, spec.granularity, symmetric=spec.symmetric)
    power = (steps * problem.shrink).square().expand(len(problem.weight), -1).sum(0) / 12  # (G,)
    spread = power.new_zeros(len(columns) + 1).index_add(
        0, problem.groups.flatten(), power.repeat_interleave(problem.groups.shape[1])
    )[:-1]
    by_channel = (spread * problem.free / columns.square()).reshape(problem.taps, -1).sum(0)
    share = problem.moment / problem.moment.mean(0).clamp(min=_SMALL)
    return share @ by_channel


def output_noise(problem: LayerProblem, channel_scale: Tensor) -> Tensor:
    """Return L_t, shape (S,)."""
    return activation_noise(problem, channel_scale) + weight_noise(problem, channel_scale)
