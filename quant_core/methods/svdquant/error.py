"""The error of a layer's output with codes for what a low-rank branch leaves of its weight.

With the input x divided by tau (`channel_scale` in code), codes Q(R) of the residual R = (W - L1 L2) tau, and the
branch L1 L2 on x itself, the output is off by

    Q(R) (Q(x / tau) - x / tau)  +  (Q(R) - R) x / tau.

The second term is measured: R is rounded as it will be, and weighed with the second moment of the calibration inputs.
The first is the rounding noise of the input's grids on calibration inputs, uniform and independent; it passes through
the residual alone, which is what the branch gains with few activation bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.closed_form import factorize, round_closed_form
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.fit.low_rank_branch import LowRankBranch
from quant_core.methods.dmq.expected_error import LayerProblem, activation_noise, make_problem, weight_noise
from quant_core.nn.activation import dynamic_qparams
from quant_core.nn.layers import weight_groups
from quant_core.nn.ranges import QParams
from quant_spec.enums import ActivationMode, Granularity, RoundingMethod
from quant_spec.formats import LayerSpec
from quant_spec.ranges import RangeSpec

#: Output channels, evenly spread, that errors are measured on.
MEASURED_ROWS = 128
#: Mean square error of an E4M3 number, over its square: uniform within 2**-3 of the power of two below it.
_E4M3_NOISE = 2.0**-6 / 24


@dataclass(frozen=True, slots=True)
class LayerCase:
    """One layer, and what was seen of its input.

    Attributes
    ----------
    weight : Tensor, shape (C_out, C_in, *kernel), dtype float32
    moment : Tensor, shape (K, K), dtype float32
        E[x x^T] of the undivided input.
    problem : LayerProblem
        For the expected error of a weight and channel scales.
    """

    spec: LayerSpec
    weight: Tensor
    ranges: RangeSpec
    stats: ChannelStats
    moment: Tensor
    problem: LayerProblem
    rounding: RoundingMethod
    damping: float

    @classmethod
    def of(
        cls,
        spec: LayerSpec,
        weight: Tensor,
        ranges: RangeSpec,
        stats: ChannelStats,
        moment: Tensor,
        free: Tensor,
        rounding: RoundingMethod,
        damping: float,
    ) -> LayerCase:
        """Collect a layer; `free` as in `expected_error.LayerProblem`."""
        problem = make_problem(spec, weight, RangeSpec(), stats, free)
        return cls(spec, weight, ranges, stats, moment, problem, rounding, damping)

    def columns(self, channel_scale: Tensor) -> Tensor:
        """Return what each column of the weight matrix is multiplied with, shape (K,)."""
        return channel_scale.repeat(self.problem.taps)

    def scaled(self, channel_scale: Tensor) -> Tensor:
        """Return the weight matrix with its columns multiplied, shape (C_out, K)."""
        return self.problem.weight * self.columns(channel_scale)


def input_noise(case: LayerCase, residual: Tensor, channel_scale: Tensor) -> float:
    """Return the expected error power at the output of quantizing the input, mean over the trajectory.

    `residual`: the undivided weight (C_out, K) that codes stand for.
    """
    activation = case.spec.activation
    if activation is None:
        return 0.0
    problem = replace(case.problem, weight=residual)
    by_channel = residual.square().sum(0).reshape(problem.taps, -1).sum(0)
    if activation.is_float:
        return float((case.stats.second_moment() @ by_channel).mean() * _E4M3_NOISE)
    if activation.mode is not ActivationMode.DYNAMIC_TOKEN or not case.stats.positions:
        return float(activation_noise(problem, channel_scale).mean())
    rows = torch.cat([case.stats.samples(step).flatten(0, 1) for step in range(case.stats.steps)]) / channel_scale
    steps = dynamic_qparams(rows, activation).scale
    return float(steps.square().mean() / 12 * (channel_scale.square() * by_channel).sum())


def expected_error(case: LayerCase, residual: Tensor, channel_scale: Tensor) -> float:
    """Return the expected error power at the output, of input and residual; as `input_noise`."""
    problem = replace(case.problem, weight=residual)
    return input_noise(case, residual, channel_scale) + float(weight_noise(problem, channel_scale).mean())


def measured_errors(case: LayerCase, branches: Sequence[LowRankBranch | None], channel_scale: Tensor) -> list[float]:
    """Return the error power at the output with each branch, None for none: measured, plus `input_noise`."""
    columns, scaled = case.columns(channel_scale), case.scaled(channel_scale)
    moment = case.moment / columns / columns[:, None]
    chosen = torch.linspace(0, len(scaled) - 1, min(MEASURED_ROWS, len(scaled))).long()
    residuals = [scaled if branch is None else scaled - branch.matrix() * columns for branch in branches]
    groups = weight_groups(tuple(case.weight.shape), case.spec)
    grids = [_grid(case, residual, chosen, groups) for residual in residuals]
    grid = QParams(torch.cat([g.scale for g in grids]), torch.cat([g.zero_point for g in grids]))
    rows = torch.cat([residual[chosen] for residual in residuals])
    bits = case.spec.weight.bits
    if case.rounding is RoundingMethod.CLOSED_FORM:
        codes = round_closed_form(rows, factorize(moment, case.damping), grid, bits, groups)
    else:
        codes = nearest_codes(rows, grid, bits, groups)
    error = rows - (codes.float() - grid.zero_point[:, groups]) * grid.scale[:, groups]
    powers = ((error @ moment) * error).sum(1).reshape(len(branches), -1).mean(1) * len(scaled)
    return [
        float(power) + input_noise(case, residual / columns, channel_scale)
        for power, residual in zip(powers, residuals, strict=True)
    ]


def _grid(case: LayerCase, residual: Tensor, chosen: Tensor, groups: Tensor) -> QParams:
    """Return the grid of some rows of a residual."""
    if case.spec.weight.granularity is Granularity.PER_TENSOR:
        whole = weight_grid(residual, case.spec, groups, case.ranges)
        return QParams(whole.scale.expand(len(chosen), 1), whole.zero_point.expand(len(chosen), 1))
    return weight_grid(residual[chosen], case.spec, groups, case.ranges)
