"""How a sampler corrects the noise that quantization adds: tables by step, gains from a prediction to the next sample.

He et al., "PTQD", arXiv:2305.10657, Sec. 3.2 and 3.3; `quant_core.methods.ptqd.correction` fits the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from quant_spec.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class NoiseCorrection:
    """What the sampler does to each step's prediction: (eps_hat - bias) / (1 + k).

    Attributes
    ----------
    timesteps : tuple of float, length S
        Of the scheduler.
    k : Tensor, shape (S,), dtype float64
    bias : Tensor, shape (S, C), dtype float64
    variance : Tensor, shape (S,), dtype float64
        Of what is left after that, per element; 0 where the noise of the sampler is to stay.
    channel_dim : int
        Of the predictions: 1 for images, -1 for tokens.
    """

    timesteps: tuple[float, ...]
    k: Tensor
    bias: Tensor
    variance: Tensor
    channel_dim: int = 1

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        tables = {name: torch.tensor(data[name], dtype=torch.float64) for name in ("k", "bias", "variance")}
        return cls(tuple(data["timesteps"]), channel_dim=data["channel_dim"], **tables)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        tables = {"k": self.k.tolist(), "bias": self.bias.tolist(), "variance": self.variance.tolist()}
        return {"timesteps": list(self.timesteps), "channel_dim": self.channel_dim, **tables}


def derivatives(prediction_type: str, abar: float) -> tuple[float, float]:
    """Return the derivatives of the predicted sample x_0 and of the predicted noise by the network's output.

    `abar` is the cumulative product of alphas at the step.
    """
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    if prediction_type == "epsilon":
        return -sigma / alpha, 1.0
    if prediction_type == "sample":
        return 1.0, -alpha / sigma
    if prediction_type == "v_prediction":
        return -sigma, alpha
    raise QuantizationError(f"prediction_type: got {prediction_type!r}, wanted epsilon, sample or v_prediction")


def ddim_gain(prediction_type: str, abar: float, abar_next: float, sigma: float) -> float:
    """Return d x_p / d output of a DDIM step that adds noise of standard deviation `sigma`.

    The direction term keeps the scheduled sigma, also where less noise is added.
    """
    by_sample, by_noise = derivatives(prediction_type, abar)
    return math.sqrt(abar_next) * by_sample + math.sqrt(max(0.0, 1 - abar_next - sigma**2)) * by_noise


def ddpm_gain(prediction_type: str, abar: float, abar_next: float) -> float:
    """Return d x_p / d output of an ancestral DDPM step."""
    beta = 1 - abar / abar_next
    return math.sqrt(abar_next) * beta / (1 - abar) * derivatives(prediction_type, abar)[0]


def euler_ancestral_gain(prediction_type: str, sigma: float, sigma_down: float) -> float:
    """Return d x_p / d output of an Euler-ancestral step from noise level `sigma` to `sigma_down`."""
    by_sample = {"epsilon": -sigma, "v_prediction": -sigma / math.sqrt(sigma**2 + 1)}
    if prediction_type not in by_sample:
        raise QuantizationError(f"prediction_type: got {prediction_type!r}, wanted epsilon or v_prediction")
    return -by_sample[prediction_type] / sigma * (sigma_down - sigma)


def noise_scale(sigma: float, gain: float, variance: float) -> float:
    """Return sigma' / sigma: what is left of a step's noise after the prediction's error is taken out of it (Sec. 3.3).

    0 where the error has more variance than the noise.
    """
    if sigma <= 0:
        return 1.0
    return math.sqrt(max(0.0, 1 - gain**2 * variance / sigma**2))
