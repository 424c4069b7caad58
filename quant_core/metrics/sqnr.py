"""Signal-to-quantization-noise ratio of the denoiser's prediction at each step of the full-precision trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.diffusion.finite import Moment, check_prediction
from quant_core.metrics.psnr import IDENTICAL_DB


class Predictions(Protocol):
    """A tensor, or one in a file."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """Return a part."""


def error_power(model: nn.Module, trajectory: CalibrationSet, predictions: Predictions, batch_size: int) -> Tensor:
    """Sum the power of the full-precision predictions and of a model's error on the same inputs.

    Parameters
    ----------
    trajectory : CalibrationSet
        Inputs of the full-precision model, S steps of n rows.
    predictions : Tensor or safetensors slice, shape (S, n, *sample), dtype float32
        What it predicted; read a batch at a time.

    Returns
    -------
    Tensor, shape (2, S), dtype float64
        Sums over rows of |eps|^2 and |eps_hat - eps|^2; sums of shards add up.

    Raises
    ------
    NotFiniteError
        If the model predicts NaN or infinity.
    """
    sums = torch.zeros(2, trajectory.steps, dtype=torch.float64)
    done = [0] * trajectory.steps
    # Trajectory by trajectory, as a sampler calls: a model may hold differences between steps.
    for batch in trajectory.by_trajectory(batch_size):
        step = int(batch.step[0])
        expected = predictions[step, done[step] : done[step] + len(batch)].double()
        done[step] += len(batch)
        error = _predict(model, batch) - expected
        sums[:, step] += torch.stack([expected.square().sum(), error.square().sum()])
    return sums


@torch.no_grad()
def _predict(model: nn.Module, batch: Batch) -> Tensor:
    prediction = replay(model, batch).to("cpu", torch.float64)
    check_prediction(Moment(int(batch.step[0]), batch.timestep[0]), prediction, model)
    return prediction


def sqnr_db(signal: Sequence[float], error: Sequence[float]) -> list[float]:
    """Return 10 log10(signal / error) per step, in dB; at most 144 dB, which stands for no error."""
    return [
        min(10 * math.log10(s / e), IDENTICAL_DB) if s > 0 and e > 0 else (IDENTICAL_DB if e == 0 else 0.0)
        for s, e in zip(signal, error, strict=True)
    ]


def sqnr_per_sample(reference: Tensor, quantized: Tensor) -> Tensor:
    """Return 10 log10(|x|^2 / |x_hat - x|^2) of each sample, shape (n,), dtype float64, in dB; at most 144 dB."""
    reference, quantized = reference.double().flatten(1), quantized.double().flatten(1)
    ratio = reference.square().sum(1) / (quantized - reference).square().sum(1)
    return (10 * torch.log10(ratio)).clamp(max=IDENTICAL_DB)
