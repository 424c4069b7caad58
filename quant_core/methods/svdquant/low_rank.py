"""SVDQuant: outliers moved into the weight, its largest singular values kept in 16 bits, codes for what is left.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", arXiv:2411.05007, Sec. 4.1
and 4.2: y = Q(R) Q(x / tau) + L1 L2 x, with L1 L2 the truncated SVD of the smoothed weight. What is left, R, is rounded
by the pass `round`, in closed form for instance.

Where we differ from the authors' code (deepcompressor), and why:

- The branch reads the input before it is divided: tau is folded into L2, which saves a division.
- Candidates are compared by the error that is measured and expected at the layer's output for the rounding of
  deployment (`quant_core.methods.svdquant.error`) in place of forwards for each. Smoothing has ten candidates, none
  among them.
- The rank can be chosen for each layer: by how much it lowers that error, in dB, less 6.02 dB for each bit per weight
  that it takes, which is what a bit more of codes would bring. A small layer, whose branch is a large share of it, has
  none.
- L1 and L2 may be those that leave least error at the output for the inputs seen, W projected on the first left
  singular vectors of W H^1/2, and are where that was measured to be better: the residual is then larger, but cheaper to
  round.
- Theirs alternates between the SVD and rounding to nearest, up to 100 times; closed-form rounding does what that is
  for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.low_rank_branch import LowRankBranch
from quant_core.fit.observe import Watched, observe
from quant_core.fit.rounding import UnitRanges
from quant_core.methods.dmq.channel_scale import smooth_scale
from quant_core.methods.dmq.expected_error import free_variance
from quant_core.methods.svdquant.branch import branches_of
from quant_core.methods.svdquant.error import LayerCase, expected_error, measured_errors
from quant_spec.enums import ActivationMode, RoundingMethod
from quant_spec.formats import LOW_RANK_BITS, LayerSpec, UnitFormat
from quant_spec.tasks.low_rank import Params

#: What a bit more of codes brings: a step half as long, 20 log10(2).
DB_PER_BIT = 20 * math.log10(2)
_EXPONENTS = tuple(round(0.1 * i, 1) for i in range(1, 10))
_SMALL = 1e-30


@dataclass(frozen=True, slots=True)
class BranchReport:
    """What became of one layer.

    `rank`: of its branch, 0 for none. `exponent`: of smoothing, 0 for none. `gain_db`: by how much the branch lowers
    the error of the layer's output. `bits`: that the branch takes, per weight. `weighed`: 1 if its matrices were chosen
    for the inputs, 0 if for the weight alone.
    """

    rank: int
    exponent: float
    gain_db: float
    bits: float
    weighed: int


def fit(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormat, UnitRanges]],
    config: Params,
    scaling: ChannelScaling,
) -> tuple[dict[str, LowRankBranch], ChannelScaling, dict[str, BranchReport]]:
    """Choose the branches of a group of units' layers, every layer on its own.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser, left as it is.
    units : sequence of (UnitFormat, UnitRanges)
        In the order in which they run. Layers of 8-bit weights, grouped convolutions and, unless asked for, all
        convolutions are passed over.
    scaling : ChannelScaling
        What channels are divided by already; smoothing chooses it otherwise.

    Returns
    -------
    dict of str to LowRankBranch, ChannelScaling, dict of str to BranchReport
        A layer without a branch is not among the first; the second is what smoothing chose.
    """
    specs = {
        name: spec
        for unit, _ in units
        for name, spec in unit.layers.items()
        if _takes_branch(model, name, spec, config)
    }
    grids = {name: each for _, unit in units for name, each in unit.weights.items()}
    watched = Watched(
        layers={},
        attentions=(),
        moments=list(specs),
        positions=config.positions,
        samples=config.samples,
        keep_values=False,
        channels={name: _drawn(spec) for name, spec in specs.items()},
    )
    names = [formats.unit for formats, _ in units]
    seen = observe(model, calibration, names, watched, batch_size=config.forward_batch_size, seed=config.seed)
    branches, scales, reports = {}, {}, {}
    for name, spec in specs.items():
        weight = model.get_parameter(f"{name}.weight").detach().float().cpu()
        moment = seen.moments[name].mean().cpu()
        closed = config.rounding is RoundingMethod.CLOSED_FORM
        free = free_variance(moment, config.damping) if closed else moment.diagonal()
        case = LayerCase.of(
            spec, weight, grids[name], seen.channels[name], moment, free, config.rounding, config.damping
        )
        generator = seed_stream(config.seed, f"singular vectors of {name}")
        given = scaling.scales.get(name)
        exponent, channel_scale = (0.0, given) if given is not None else choose_smoothing(case, config, generator)
        if channel_scale is not None and given is None:
            scales[name] = channel_scale
        branch, report = choose_branch(case, config, channel_scale, exponent, generator)
        if branch is not None:
            branches[name] = branch
        reports[name] = report
    return branches, ChannelScaling(scales), reports


def choose_smoothing(case: LayerCase, config: Params, generator: torch.Generator) -> tuple[float, Tensor | None]:
    """Return the exponent and the channels' scales of least expected error, with a branch; (0, None) for none."""
    if config.smoothing is None:
        return 0.0, None
    if config.smoothing != "search":
        return config.smoothing, smooth_scale(case.stats, case.weight, config.smoothing)
    best: tuple[float, Tensor | None] = (0.0, None)
    least = _smoothed_error(case, torch.ones(case.problem.channels), config, generator)
    for exponent in _EXPONENTS:
        channel_scale = smooth_scale(case.stats, case.weight, exponent)
        error = _smoothed_error(case, channel_scale, config, generator)
        if error < least:
            least, best = error, (exponent, channel_scale)
    return best


def _smoothed_error(case: LayerCase, channel_scale: Tensor, config: Params, generator: torch.Generator) -> float:
    """Return the expected error with these scales and a branch of the rank asked for, or of the greatest."""
    ranks = _ranks(case.problem.weight, config)
    columns, scaled = case.columns(channel_scale), case.scaled(channel_scale)
    residual = scaled
    if ranks:
        branch = branches_of(scaled, columns, [ranks[-1]], None, generator, damping=config.damping)[0]
        residual = scaled - branch.matrix() * columns
    return expected_error(case, residual / columns, channel_scale)


def choose_branch(
    case: LayerCase, config: Params, channel_scale: Tensor | None, exponent: float, generator: torch.Generator
) -> tuple[LowRankBranch | None, BranchReport]:
    """Return the best branch of the rank asked for, or of any: the one that gains most for its bits."""
    ranks = _ranks(case.problem.weight, config)
    if not ranks:
        return None, BranchReport(0, exponent, 0.0, 0.0, 0)
    scale = torch.ones(case.problem.channels) if channel_scale is None else channel_scale
    columns, scaled = case.columns(scale), case.scaled(scale)
    moment = case.moment / columns / columns[:, None]
    plain, weighed = (
        branches_of(scaled, columns, ranks, each, generator, damping=config.damping) for each in (None, moment)
    )
    none, *errors = measured_errors(case, [None, *plain, *weighed], scale)
    gains = [10 * math.log10(max(none, _SMALL) / max(error, _SMALL)) for error in errors]
    candidates = [*plain, *weighed]
    costs = [branch_bits(branch) for branch in candidates]
    counted = DB_PER_BIT if config.rank == "auto" else 0.0
    best = max(range(len(candidates)), key=lambda at: gains[at] - counted * costs[at])
    if config.rank == "auto" and gains[best] <= counted * costs[best]:
        return None, BranchReport(0, exponent, 0.0, 0.0, 0)
    branch = candidates[best]
    return branch, BranchReport(branch.rank, exponent, gains[best], costs[best], int(best >= len(plain)))


def branch_bits(branch: LowRankBranch) -> float:
    """Return the bits of a branch, per weight of its layer."""
    rows, columns = branch.up.shape[0], branch.down.shape[1]
    return LOW_RANK_BITS * branch.rank * (rows + columns) / (rows * columns)


def _ranks(matrix: Tensor, config: Params) -> list[int]:
    """Return the ranks to try, rising: at most half of what the matrix can have."""
    most = min(matrix.shape) // 2
    if config.rank != "auto":
        return [min(config.rank, most)] if most else []
    greatest = min(config.max_rank, most)
    return sorted({greatest, *(2**power for power in range(12) if 2**power <= greatest)}) if greatest else []


def _takes_branch(model: nn.Module, name: str, spec: LayerSpec, config: Params) -> bool:
    """Whether a layer may have a branch: 8 bits need none."""
    layer = model.get_submodule(name)
    may = isinstance(layer, nn.Linear) or (config.convolutions and getattr(layer, "groups", 1) == 1)
    return may and spec.weight.bits < 8


def _drawn(spec: LayerSpec) -> int:
    """Return how many positions of each sample are kept of a layer's input: ranges of tokens are taken of them."""
    activation = spec.activation
    return int(activation is not None and activation.mode is ActivationMode.DYNAMIC_TOKEN)
