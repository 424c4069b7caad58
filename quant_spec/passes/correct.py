"""Correct: correct the noise that quantization adds to the predictions, in the sampler (PTQD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.enums import UnknownTimestep
from quant_spec.record import Count, Fraction, Record, Seed


class CorrectFit(Record):
    """Which parts of the correction are used, and when (the paper's CNC, BC and VSC)."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {("scale", True): frozenset({"least_r2"})}

    scale: bool = Field(
        default=True, description="Divide by 1 + k, k being the part of the error that follows the prediction."
    )
    bias: bool = Field(default=True, description="Subtract the error's mean in each channel.")
    variance: bool = Field(
        default=True,
        description="Take the variance that is left out of the noise that DDPM, DDIM with eta above 0 and "
        "Euler-ancestral add.",
    )
    least_r2: Fraction = Field(
        default=0.0,
        description="Share of the error's variance that the prediction must explain for scale to be used at a step.",
    )
    held_out: bool = Field(
        default=True, description="Use scale and bias only at steps where they lower the error on held-out seeds."
    )
    unknown_timestep: UnknownTimestep = Field(
        default=UnknownTimestep.ERROR,
        description="What the sampler does on another trajectory; nearest takes the nearest step, with a warning.",
    )


class Correct(CorrectFit):
    """Correct the noise that quantization adds to the predictions, in the sampler (PTQD)."""

    seeds: Count = Field(default=64, description="Trajectories that the correction is fitted on.")
    held_out_seeds: Count = Field(default=32, description="Trajectories after these, that decide what is used.")
    first_seed: Seed = Field(default=2_000_000, description="First of their seeds.")
    shard_seeds: Count = Field(default=16, description="Seeds per task.")
    batch_size: Count = Field(default=32, description="Seeds per denoiser call.")
