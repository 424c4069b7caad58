"""Peak signal-to-noise ratio of samples against the full-precision samples of the same seeds, with a confidence
interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import t as student_t
from torch import Tensor

from quant_spec.enums import SampleSpace

#: PSNR of two samples that are equal bit for bit: one part in 2**24, float32's mantissa.
IDENTICAL_DB = 144.0


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with the half width of its 95 % confidence interval, and how many values it is of."""

    value: float
    ci95: float
    n: int


def psnr_per_sample(reference: Tensor, quantized: Tensor, space: SampleSpace) -> Tensor:
    """Return the PSNR of each sample in dB.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, ...), dtype float32
    space : SampleSpace
        Pixels are clamped to [-1, 1] and their peak is 2. Latents are not clamped; their peak is the range of the
        reference sample.

    Returns
    -------
    Tensor, shape (n,), dtype float64
        At most 144 dB, which stands for equal samples.
    """
    reference, quantized = reference.double(), quantized.double()
    if space is SampleSpace.PIXELS:
        reference, quantized = reference.clamp(-1, 1), quantized.clamp(-1, 1)
        peak = torch.full((len(reference),), 2.0, dtype=torch.float64)
    else:
        peak = reference.flatten(1).amax(1) - reference.flatten(1).amin(1)
    error = (quantized - reference).flatten(1).square().mean(1)
    return (10 * torch.log10(peak.square() / error)).clamp(max=IDENTICAL_DB)


def mean_with_ci(values: Sequence[float]) -> Mean:
    """Return the mean and the half width of its 95 % confidence interval by Student's t (0 for a single value)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Mean(mean, 0.0, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Mean(mean, float(student_t.ppf(0.975, n - 1)) * math.sqrt(variance / n), n)


def psnr_of_mean_error(values: Sequence[float]) -> float:
    """Return the PSNR of the mean squared error, in dB, given each sample's PSNR in dB.

    Where a few samples are far off it is well below the mean of the decibels.
    """
    return -10 * math.log10(math.fsum(10 ** (-value / 10) for value in values) / len(values))
