"""Noise: moments of what quantization adds to the predictions, on a shard of full-precision trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

NOISE = "noise"


class Params(TaskParams):
    """How to sample."""

    sampler: Sampler
    batch_size: Count = Field(description="Seeds per denoiser call.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The packed tree, and a shard with the trajectory of all its seeds."""

    packed: Source
    reference: Source


KIND = TaskKind("noise", 1, "workers.tasks.noise:run", Params, Inputs, (NOISE,), gpu=True, batch_free="batch_size")
