"""DMQ: equivalent scaling of input channels that is learned, and power-of-two scaling of those that stay unlike.

Lee et al., "DMQ: Dissecting Outliers of Diffusion Models for Post-Training Quantization", arXiv:2507.12933: learned
equivalent scaling (Sec. 4.1), adaptive timestep weighting (Sec. 4.2), channel-wise power-of-two scaling with the vote
(Sec. 4.3, Algorithm 1). Rounding the scaled weights is the other passes' business.

Channel k of a layer's input is divided by tau_k and its weight multiplied; both are then quantized. What is minimised
is the error that is expected at the layer's output at every trajectory step (`quant_core.methods.dmq.expected_error`).

Where we differ from the authors' code (dmq@48ce8bc), and why:

- Their loss is the squared error of one batch, rounded to nearest, ranges those of the batch (of mixed steps). Ours is
  its expectation over rounding errors: no sampling noise, every step in every iteration, ranges of deployment, the
  rounding of deployment (nearest overstates the weights' error by what closed-form rounding saves, so its tau is too
  timid), and seconds instead of 6000 iterations on batches.
- tau = exp(theta), of geometric mean 1; a result that is not better than none is not taken.
- tau can be learned for the extremes of a part of the calibration seeds (`held_out`). What evens out the channels of
  some samples leaves every channel at the end of its range, and of as many channels, some exceed it on any sample that
  was not among them: at 8 bits, clipping made more error on new samples than all rounding. Ranges, which are measured
  on all samples, then have room for what tau has not seen.
- Lambda is updated for all steps at once. Steps are looked up by index; theirs are 20 bins of 1000 timesteps.
- The vote is on inputs of the full-precision model, before rounding, so that what follows sees the steps of
  deployment; theirs comes last. Ties go to the coarser step. As in their code (the paper prints the opposite),
  channels without consensus keep the min-max step. So do those whose error over all samples, those that did not agree
  and the greatest values seen included, would not fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.affine import fake_quantize_affine
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.channel_factors import ChannelFactors
from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.observe import VALUES_PER_STEP, StepRanges, Watched, observe
from quant_core.fit.rounding import UnitRanges
from quant_core.fit.unit_state import UnitFormats
from quant_core.methods.dmq.expected_error import LayerProblem, free_variance, make_problem, output_noise
from quant_core.nn.ranges import QParams
from quant_spec.enums import ActivationMode, RangeMethod, RoundingMethod, Scaling, Shift, Weighting
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec
from quant_spec.ranges import RangeSpec

#: Positions of each sample that vote.
VOTE_POSITIONS = 64
#: What the latest steps count under EARLY, the first counting 1.
EARLY_FLOOR = 0.02
_SMALL = 1e-12


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How channels are scaled.

    `exponent`: SmoothQuant's, of the activations. `iterations` and `lr` of Adam, the latter falling to 0 by a cosine.
    `alpha` (20: Table 8 of the paper) and `xi` (0.95) are for ADAPTIVE, `half_life` for EARLY. `rounding` and
    `damping` of the weights later; second moments are over `samples` calibration rows per step (which also vote) and
    `positions` output positions per row. `consensus` (kappa, 0.85): share of rows that must agree. `least_spread`: what
    VARIANCE takes, the standard deviation of the channels' ranges over their mean, averaged over steps. `held_out`:
    share of the calibration rows, the last, whose extremes LEARNED does not see.
    """

    method: Scaling = Scaling.LEARNED
    exponent: float = 0.5
    iterations: int = 200
    lr: float = 2e-2
    weighting: Weighting = Weighting.ADAPTIVE
    alpha: float = 20.0
    xi: float = 0.95
    half_life: float = 0.05
    rounding: RoundingMethod = RoundingMethod.CLOSED_FORM
    damping: float = 0.03
    samples: int | None = None
    positions: int | None = 16
    shift: Shift = Shift.NONE
    consensus: float = 0.85
    least_spread: float = 0.5
    held_out: float = 0.0
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", Scaling(self.method))
        object.__setattr__(self, "weighting", Weighting(self.weighting))
        object.__setattr__(self, "rounding", RoundingMethod(self.rounding))
        object.__setattr__(self, "shift", Shift(self.shift))


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """What became of one layer: the expected error of its output against that without scales, in dB; tau's extremes;
    the share of channels and steps with a finer step than min-max."""

    gain_db: float
    least: float
    greatest: float
    shifted: float


def fit(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormats, UnitRanges]],
    config: ScaleConfig,
) -> tuple[ChannelFactors, dict[str, ScaleReport]]:
    """Choose the channels' factors of a group of units, every layer on its own.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser, left as it is.
    units : sequence of (UnitFormats, UnitRanges)
        In the order in which they run. Layers whose input is not quantized, and grouped convolutions, are passed over.
    """
    specs = {
        name: spec for formats, _ in units for name, spec in formats.layers.items() if _is_scalable(model, name, spec)
    }
    ranges = {name: each for _, unit in units for name, each in unit.activations.items()}
    grids = {name: each for _, unit in units for name, each in unit.weights.items()}
    learned = config.method is Scaling.LEARNED
    seen = observe(
        model,
        calibration,
        [formats.unit for formats, _ in units],
        Watched(
            layers={},
            attentions=(),
            moments=list(specs) if learned else [],
            positions=config.positions,
            samples=config.samples,
            keep_values=False,
            channels={name: _positions(spec, config) for name, spec in specs.items()},
            early=max(1, round(calibration.samples * (1 - config.held_out))),
        ),
        batch_size=config.batch_size,
        seed=config.seed,
    )
    scales, shifts, reports = {}, {}, {}
    for name, spec in specs.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        stats = seen.channels[name]
        tau, gain = torch.ones(stats.channels), 0.0
        if learned:
            hessian = seen.moments[name].mean().cpu()
            closed = config.rounding is RoundingMethod.CLOSED_FORM
            free = free_variance(hessian, config.damping) if closed else hessian.diagonal()
            deployed = make_problem(spec, weight, grids[name], stats, free)
            tau, gain = learn_scale(replace(deployed, low=stats.early_low, high=stats.early_high), config, deployed)
        elif config.method is Scaling.SMOOTH:
            tau = smooth_scale(stats, weight, config.exponent)
        if config.method is not Scaling.NONE:
            scales[name] = tau
        shift = choose_shifts(spec, stats, tau, ranges.get(name, RangeSpec()), config)
        if shift is not None:
            shifts[name] = shift
        share = 0.0 if shift is None else float((shift < SHIFT_DEPTH).float().mean())
        reports[name] = ScaleReport(gain, float(tau.min()), float(tau.max()), share)
    return ChannelFactors(scales, shifts), reports


def _is_scalable(model: nn.Module, name: str, spec: LayerSpec) -> bool:
    return spec.activation is not None and getattr(model.get_submodule(name), "groups", 1) == 1


def _positions(spec: LayerSpec, config: ScaleConfig) -> int:
    """Return how many positions of a layer's input are kept for the vote."""
    assert spec.activation is not None
    may = config.shift is Shift.VARIANCE or (config.shift is Shift.SKIP and spec.split is not None)
    return VOTE_POSITIONS if may and not spec.activation.is_dynamic else 0


def step_weights(losses: Tensor, alpha: float) -> Tensor:
    """Return (1 - Lambda_t / sum Lambda)^alpha of accumulated losses, shape (S,); 1 where there is but one step."""
    return torch.ones(1) if len(losses) == 1 else (1 - losses / losses.sum().clamp(min=_SMALL)) ** alpha


def early_weights(steps: int, half_life: float) -> Tensor:
    """Return 2^(-t / (half_life S)) + EARLY_FLOOR, shape (S,): half after that share of the trajectory."""
    return 2.0 ** (-torch.arange(steps) / (half_life * steps)) + EARLY_FLOOR


def learn_scale(
    problem: LayerProblem, config: ScaleConfig, deployed: LayerProblem | None = None
) -> tuple[Tensor, float]:
    """Minimise sum_t lambda_t L_t over tau = exp(theta).

    Parameters
    ----------
    deployed : LayerProblem, optional
        With the ranges that will be deployed, if those of `problem` are of fewer samples.

    Returns
    -------
    Tensor, shape (C_in,), dtype float32; float
        tau, and by how many dB the expected error of `deployed` falls.
    """
    deployed = problem if deployed is None else deployed
    theta = torch.zeros(problem.channels, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    with torch.no_grad():
        start = output_noise(problem, theta.exp())
    accumulated = torch.zeros_like(start)
    weights = torch.ones_like(start)
    if config.weighting is Weighting.EARLY:
        weights = early_weights(len(start), config.half_life)
    for _ in range(config.iterations):
        losses = output_noise(problem, theta.exp())
        if config.weighting is Weighting.ADAPTIVE:
            accumulated = config.xi * accumulated + (1 - config.xi) * losses.detach()
            weights = step_weights(accumulated, config.alpha)
        loss = (weights * losses).sum() / start.sum().clamp(min=_SMALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tau = (theta - theta.mean()).exp()
        before, after = (float((weights * output_noise(deployed, each)).sum()) for each in (torch.ones_like(tau), tau))
    if not 0 < after < before:
        return torch.ones(problem.channels), 0.0
    return tau, 10 * math.log10(before / after)


def smooth_scale(stats: ChannelStats, weight: Tensor, exponent: float) -> Tensor:
    """Return max |x_k|^e / max |W_k|^(1 - e), of geometric mean 1 (SmoothQuant, arXiv:2211.10438, Eq. 4)."""
    activation = torch.maximum(stats.high, -stats.low).amax(0).clamp(min=1e-5)
    weights = weight.detach().float().cpu().abs().transpose(0, 1).flatten(1).amax(1).clamp(min=1e-5)
    logs = exponent * activation.log() - (1 - exponent) * weights.log()
    return (logs - logs.mean()).exp()


def choose_shifts(
    spec: LayerSpec, stats: ChannelStats, tau: Tensor, ranges: RangeSpec, config: ScaleConfig
) -> Tensor | None:
    """Return the exponents of a layer's channels at each step (one row if static), shape (S, C_in), or None."""
    if not stats.positions:
        return None
    low, high = stats.low / tau, stats.high / tau
    if config.shift is Shift.VARIANCE:
        width = high.clamp(min=0) - low.clamp(max=0)
        spread = width.std(1, correction=0) / width.mean(1).clamp(min=_SMALL)
        if float(spread.mean()) < config.least_spread:
            return None
    spec_a = spec.activation
    assert spec_a is not None
    samples = [stats.samples(step) / tau for step in range(stats.steps)]
    least, most, count = low, high, stats.count
    if spec_a.mode is ActivationMode.STATIC:
        samples, count = [torch.cat(samples)], count.sum()[None]
        least, most = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
    sizes = spec.split or (len(tau),)
    rows, first = [], 0
    for size in sizes:
        own = slice(first, first + size)
        parts = [x[..., own] for x in samples]
        grid = _base_grid(spec_a, ranges, low[:, own], high[:, own], parts)
        bits = spec_a.step_bits or (spec_a.bits,) * len(samples)
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
    """Of all values that were seen of each channel at a step: the least and greatest, (C,); how many, ()."""

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
