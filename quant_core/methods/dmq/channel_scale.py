"""What input channels are divided by and weights multiplied with: learned for the expected error, or SmoothQuant's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant_core.fit.channel_stats import ChannelStats
from quant_core.methods.dmq.expected_error import LayerProblem, output_noise
from quant_spec.enums import Weighting
from quant_spec.passes.scale import Scale

#: What the latest steps count under EARLY, the first counting 1.
EARLY_FLOOR = 0.02
_SMALL = 1e-12


def step_weights(losses: Tensor, alpha: float) -> Tensor:
    """Return (1 - Lambda_t / sum Lambda)^alpha of accumulated losses, shape (S,); 1 where there is but one step."""
    return torch.ones(1) if len(losses) == 1 else (1 - losses / losses.sum().clamp(min=_SMALL)) ** alpha


def early_weights(steps: int, half_life: float) -> Tensor:
    """Return 2^(-t / (half_life S)) + EARLY_FLOOR, shape (S,): half after that share of the trajectory."""
    return 2.0 ** (-torch.arange(steps) / (half_life * steps)) + EARLY_FLOOR


def learn_scale(problem: LayerProblem, config: Scale, deployed: LayerProblem | None = None) -> tuple[Tensor, float]:
    """Minimise sum_t lambda_t L_t over tau = exp(theta), `channel_scale` and `log_scale` in code (Sec. 4.1 and 4.2).

    Parameters
    ----------
    deployed : LayerProblem, optional
        With the ranges that will be deployed, if those of `problem` are of fewer samples.

    Returns
    -------
    Tensor, shape (C_in,), dtype float32; float
        channel_scale, and by how many dB the expected error of `deployed` falls.
    """
    deployed = problem if deployed is None else deployed
    log_scale = torch.zeros(problem.channels, requires_grad=True)
    optimizer = torch.optim.Adam([log_scale], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    with torch.no_grad():
        start = output_noise(problem, log_scale.exp())
    accumulated = torch.zeros_like(start)
    weights = torch.ones_like(start)
    if config.weighting is Weighting.EARLY:
        weights = early_weights(len(start), config.half_life)
    for _ in range(config.iterations):
        losses = output_noise(problem, log_scale.exp())
        if config.weighting is Weighting.ADAPTIVE:
            accumulated = config.xi * accumulated + (1 - config.xi) * losses.detach()
            weights = step_weights(accumulated, config.alpha)
        loss = (weights * losses).sum() / start.sum().clamp(min=_SMALL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        channel_scale = (log_scale - log_scale.mean()).exp()
        before, after = (
            float((weights * output_noise(deployed, each)).sum())
            for each in (torch.ones_like(channel_scale), channel_scale)
        )
    if not 0 < after < before:
        return torch.ones(problem.channels), 0.0
    return channel_scale, 10 * math.log10(before / after)


def smooth_scale(stats: ChannelStats, weight: Tensor, exponent: float) -> Tensor:
    """Return max |x_k|^e / max |W_k|^(1 - e), of geometric mean 1 (SmoothQuant, arXiv:2211.10438, Eq. 4)."""
    activation = torch.maximum(stats.high, -stats.low).amax(0).clamp(min=1e-5)
    weights = weight.detach().float().cpu().abs().transpose(0, 1).flatten(1).amax(1).clamp(min=1e-5)
    logs = exponent * activation.log() - (1 - exponent) * weights.log()
    return (logs - logs.mean()).exp()
