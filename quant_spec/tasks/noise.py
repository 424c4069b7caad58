"""Noise: moments of what quantization adds to the predictions, on a shard of full-precision trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

NOISE = "noise"


class Params(TaskParams):
    """How to sample."""

    sampler: Sampler
    batch_size: Count = Field(description="Seeds per denoiser call.")
    seeds: Seeds | None = Field(default=None, description="Of a whole pipeline; a bare denoiser's are the reference's.")
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"seeds", "part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The packed tree; and a shard with the trajectory of all its seeds, or a whole pipeline's tree and prompts."""

    packed: Source
    reference: Source | None = None
    model: Source | None = None
    prompts: Source | None = None


KIND = TaskKind("noise", 1, "workers.tasks.noise:run", Params, Inputs, (NOISE,), gpu=True, batch_free="batch_size")
