"""Correct: correct the noise that quantization adds to the predictions, in the sampler (PTQD)."""

from __future__ import annotations

from pydantic import Field

from quant_spec.enums import UnknownTimestep
from quant_spec.record import Count, Fraction, Record, Seed


class CorrectFit(Record):
    """Which parts of the correction are used, and when (the paper's CNC, BC and VSC)."""

    scale: bool = Field(default=True, description="Divide by 1 + k, the part of the noise that follows the prediction.")
    bias: bool = Field(default=True, description="Subtract each channel's mean.")
    variance: bool = Field(default=True, description="Take what remains out of the noise that the sampler adds.")
    least_r2: Fraction = Field(
        default=0.0, description="Share of the noise's variance that the prediction must explain for scale to be used."
    )
    held_out: bool = Field(default=True, description="Use scale and bias only at steps where held-out seeds gain.")
    unknown_timestep: UnknownTimestep = Field(
        default=UnknownTimestep.ERROR, description="What the sampler does on another trajectory."
    )


class Correct(CorrectFit):
    """Correct the noise that quantization adds to the predictions, in the sampler (PTQD)."""

    seeds: Count = Field(default=64, description="Trajectories that the correction is fitted on.")
    held_out_seeds: Count = Field(default=32, description="Trajectories after these, that decide what is used.")
    first_seed: Seed = 2_000_000
    shard_seeds: Count = Field(default=16, description="Seeds per task.")
    batch_size: Count = Field(default=32, description="Seeds per denoiser call.")
