"""PTQD: correct the noise that quantization adds to a denoiser's predictions, step by step.

He et al., "PTQD: Accurate Post-Training Quantization for Diffusion Models", arXiv:2305.10657, Sec. 3.2 and 3.3 (Sec.
3.4, bits per step, is `quant_core.methods.ptqd.step_bits`). With eps the full-precision prediction and D the quantized
one's difference from it, both after guidance and at the same sample, each trajectory step has

    D = k eps + D',   D' uncorrelated with eps,   D' ~ N(mu, sigma_q^2)

The sampler divides by 1 + k, subtracts mu, and takes what variance remains out of the noise that it adds itself. Where
we differ from the authors' code (PTQD@6b190f9), and why:

- Statistics are exact moments that add up over shards, not lists of all pairs; tables are by timestep, and a timestep
  without an entry is refused, where theirs silently corrects nothing, or with another step's bias.
- mu is the mean of D', as in the paper; their code takes the mean of D, which counts k E[eps] twice.
- The variance of the noise is reduced, but not the sigma in the direction term of DDIM, which their sampler overwrites.
- k and mu are used at a step only if they lower the error on held-out seeds. A k below 0 is then as good as another;
  theirs are set to 0.
- All is in terms of what the network predicts (noise, sample or velocity): D is measured there, and the sampler's own
  derivative carries it on. That derivative is of a step without clipping: where a scheduler clips the predicted
  sample (`clip_sample`, `thresholding`), a clipped element's error reaches the next sample through the direction term
  alone, with the opposite sign at eta 1, and the variance that is taken out of the noise is not quite its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from quant_core.diffusion.noise_correction import NoiseCorrection
from quant_spec.errors import QuantizationError
from quant_spec.passes.correct import CorrectFit


@dataclass(frozen=True, slots=True)
class NoiseMoments:
    """Sums over all elements of a channel at a step, of x = eps and y = D.

    Attributes
    ----------
    timesteps : tuple of float
        The scheduler's, S of them, noisiest first.
    count : int
        Elements in each sum.
    sums : Tensor, shape (5, S, C), dtype float64
        Of x, y, x x, x y, y y.
    """

    timesteps: tuple[float, ...]
    count: int
    sums: Tensor

    @classmethod
    def of(cls, timesteps: Sequence[float], channels: int) -> Self:
        """Return moments of nothing yet."""
        return cls(tuple(timesteps), 0, torch.zeros(5, len(timesteps), channels, dtype=torch.float64))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(tuple(data["timesteps"]), data["count"], torch.tensor(data["sums"], dtype=torch.float64))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping, from which the same float64 values are read back."""
        return {"timesteps": list(self.timesteps), "count": self.count, "sums": self.sums.tolist()}


def pair_sums(prediction: Tensor, difference: Tensor, channel_dim: int) -> Tensor:
    """Return the five sums of a batch of one step, shape (5, C), dtype float64.

    Parameters
    ----------
    prediction, difference : Tensor, shape (B, ...)
        eps and D.
    channel_dim : int
        Of both: 1 for images, -1 for tokens.
    """
    x, y = (value.detach().double().movedim(channel_dim, 0).flatten(1) for value in (prediction, difference))
    return torch.stack([x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)]).cpu()


def merge(parts: Sequence[NoiseMoments]) -> NoiseMoments:
    """Add up the moments of shards; bit for bit the same in any order, as every sum is rounded once.

    Raises
    ------
    QuantizationError
        If there are none, or they are of different trajectories or channels.
    """
    if not parts:
        raise QuantizationError("noise statistics: got no shards, wanted at least one")
    first = parts[0]
    for part in parts[1:]:
        if part.timesteps != first.timesteps or part.sums.shape != first.sums.shape:
            raise QuantizationError(
                f"noise statistics: got shards of {len(part.timesteps)} and {len(first.timesteps)} steps, "
                "wanted one trajectory"
            )
    columns = zip(*(part.sums.flatten().tolist() for part in parts), strict=True)
    total = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return NoiseMoments(first.timesteps, sum(part.count for part in parts), total.reshape(first.sums.shape))


@dataclass(frozen=True, slots=True)
class StepReport:
    """What was found and decided at one step; `mse` is of predictions on held-out seeds, before and after."""

    timestep: float
    k: float
    r2: float
    uses_k: bool
    uses_bias: bool
    mse_before: float
    mse_after: float


@dataclass(frozen=True, slots=True)
class FittedCorrection:
    """A correction, and the report of each step."""

    correction: NoiseCorrection
    report: list[StepReport] = field(default_factory=list)


def correlation(sums: Tensor, count: int) -> tuple[float, float]:
    """Return k = Cov(D, eps) / Var(eps) and r^2 over all channels (Sec. 3.2).

    Parameters
    ----------
    sums : Tensor, shape (5, C), dtype float64
    """
    x, y, xx, xy, yy = (float(value) for value in sums.sum(dim=1))
    n = count * sums.shape[1]
    cov_xx, cov_xy, cov_yy = xx - x * x / n, xy - x * y / n, yy - y * y / n
    if cov_xx <= 0 or cov_yy <= 0:
        return 0.0, 0.0
    return cov_xy / cov_xx, cov_xy**2 / (cov_xx * cov_yy)


def residual_bias(sums: Tensor, count: int, k: float) -> Tensor:
    """Return the mean of D' = D - k eps in each channel, shape (C,) (Sec. 3.3)."""
    return (sums[1] - k * sums[0]) / count


def residual_power(sums: Tensor, count: int, k: float, bias: Tensor) -> float:
    """Return the mean square of D - k eps - bias; divided by (1 + k)^2, the error that the correction leaves."""
    x, y, xx, xy, yy = sums
    power = yy - 2 * k * xy + k * k * xx - 2 * bias * y + 2 * k * bias * x + count * bias * bias
    return max(0.0, float(power.sum())) / (count * sums.shape[1])


def fit(fitted: NoiseMoments, held_out: NoiseMoments, config: CorrectFit, *, channel_dim: int = 1) -> FittedCorrection:
    """Fit the correction of every step, and leave out of it what does not help on held-out seeds.

    Parameters
    ----------
    fitted, held_out : NoiseMoments
        Of different seeds, on the same trajectory.
    """
    rows = [_fit_step(at, fitted, held_out, config) for at in range(len(fitted.timesteps))]
    reports, biases, variances = zip(*rows, strict=True)
    correction = NoiseCorrection(
        fitted.timesteps,
        torch.tensor([report.k if report.uses_k else 0.0 for report in reports], dtype=torch.float64),
        torch.stack(biases),
        torch.tensor(variances, dtype=torch.float64),
        channel_dim,
    )
    return FittedCorrection(correction, list(reports))


def _fit_step(
    at: int, fitted: NoiseMoments, held_out: NoiseMoments, config: CorrectFit
) -> tuple[StepReport, Tensor, float]:
    """Fit one step; returns its report, bias (C,) and remaining variance."""
    sums, unseen = fitted.sums[:, at], held_out.sums[:, at]
    found, r2 = correlation(sums, fitted.count)
    slopes = [found] if config.scale and r2 >= config.least_r2 else []
    candidates = []
    for k in (0.0, *slopes):
        for with_bias in (False, True) if config.bias else (False,):
            bias = residual_bias(sums, fitted.count, k) if with_bias else torch.zeros_like(sums[0])
            error = residual_power(unseen, held_out.count, k, bias) / (1 + k) ** 2
            candidates.append((error, k, with_bias, bias))
    before = candidates[0][0]
    after, k, uses_bias, bias = min(candidates, key=lambda each: each[0]) if config.held_out else candidates[-1]
    variance = residual_power(sums, fitted.count, k, bias) / (1 + k) ** 2 if config.variance else 0.0
    report = StepReport(fitted.timesteps[at], found, r2, k != 0.0, uses_bias, before, after)
    return report, bias, variance
