"""DMQ: equivalent scaling of input channels that is learned, and power-of-two scaling of those that stay unlike.

Lee et al., "DMQ: Dissecting Outliers of Diffusion Models for Post-Training Quantization", arXiv:2507.12933: learned
equivalent scaling (Sec. 4.1), adaptive timestep weighting (Sec. 4.2), channel-wise power-of-two scaling with the vote
(Sec. 4.3, Algorithm 1). Rounding the scaled weights is left to other passes.

Channel k of a layer's input is divided by tau_k, in code its `channel_scale`, and its weight multiplied; both are then
quantized. What is minimised is the error that is expected at the layer's output at every trajectory step
(`quant_core.methods.dmq.expected_error`).

Where we differ from the authors' code (dmq@48ce8bc), and why:

- Their loss is the squared error of one batch, rounded to nearest, ranges those of the batch (of mixed steps). Ours is
  its expectation over rounding errors: no sampling noise, every step in every iteration, ranges of deployment, the
  rounding of deployment (nearest overstates the weights' error by what closed-form rounding saves, so its tau is too
  timid), and seconds instead of 6000 iterations on batches.
- tau is learned as the exponential of what Adam moves, and has geometric mean 1; a result that is not better than none
  is not taken.
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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.observe import Watched, observe
from quant_core.fit.rounding import UnitRanges
from quant_core.methods.dmq.channel_scale import learn_scale, smooth_scale
from quant_core.methods.dmq.channel_shift import choose_shifts
from quant_core.methods.dmq.expected_error import free_variance, make_problem
from quant_spec.enums import RoundingMethod, Scaling, Shift
from quant_spec.formats import SHIFT_DEPTH, LayerSpec, UnitFormat
from quant_spec.passes.scale import Scale
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.scale import Params

#: Positions of each sample that vote.
VOTE_POSITIONS = 64


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """What became of one layer.

    `gain_db`: by how much the expected error of its output falls. `least`, `greatest`: extremes of its channel scales.
    `shifted`: share of channels and steps whose quantization step is finer than min-max.
    """

    gain_db: float
    least: float
    greatest: float
    shifted: float


def fit(
    model: nn.Module,
    calibration: CalibrationSet,
    units: Sequence[tuple[UnitFormat, UnitRanges]],
    config: Params,
) -> tuple[ChannelScaling, dict[str, ScaleReport]]:
    """Choose how the input channels of a group of units are scaled and shifted, every layer on its own.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser, left as it is.
    units : sequence of (UnitFormat, UnitRanges)
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
            fit_rows=max(1, round(calibration.samples * (1 - config.held_out))),
        ),
        batch_size=config.forward_batch_size,
        seed=config.seed,
    )
    scales, shifts, reports = {}, {}, {}
    for name, spec in specs.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        stats = seen.channels[name]
        channel_scale, gain = torch.ones(stats.channels), 0.0
        if learned:
            hessian = seen.moments[name].mean().cpu()
            closed = config.rounding is RoundingMethod.CLOSED_FORM
            free = free_variance(hessian, config.damping) if closed else hessian.diagonal()
            deployed = make_problem(spec, weight, grids[name], stats, free)
            channel_scale, gain = learn_scale(
                replace(deployed, low=stats.fit_low, high=stats.fit_high), config, deployed
            )
        elif config.method is Scaling.SMOOTH:
            channel_scale = smooth_scale(stats, weight, config.exponent)
        if config.method is not Scaling.NONE:
            scales[name] = channel_scale
        shift = choose_shifts(spec, stats, channel_scale, ranges.get(name, RangeSpec()), config)
        if shift is not None:
            shifts[name] = shift
        share = 0.0 if shift is None else float((shift < SHIFT_DEPTH).float().mean())
        reports[name] = ScaleReport(gain, float(channel_scale.min()), float(channel_scale.max()), share)
    return ChannelScaling(scales, shifts), reports


def _is_scalable(model: nn.Module, name: str, spec: LayerSpec) -> bool:
    return spec.activation is not None and getattr(model.get_submodule(name), "groups", 1) == 1


def _positions(spec: LayerSpec, config: Scale) -> int:
    """Return how many positions of a layer's input are kept for the vote."""
    assert spec.activation is not None
    may = config.shift is Shift.VARIANCE or (config.shift is Shift.SKIP and spec.split is not None)
    return VOTE_POSITIONS if may and not spec.activation.is_dynamic else 0
