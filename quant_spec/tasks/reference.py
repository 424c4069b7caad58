"""Reference: what the full-precision model samples for a shard of seeds; shared by every recipe with this sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

REFERENCE = "reference"


class Params(TaskParams):
    """How to sample, and for how many seeds the trajectory is recorded."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    sqnr_seeds: Annotated[int, Field(ge=0, description="First seeds whose trajectory is recorded.")]
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree; for a whole pipeline that is told prompts, a file of them, and what they encode to."""

    model: Source
    prompts: Source | None = None
    embeddings: Source | None = None


KIND = TaskKind(
    "reference",
    1,
    "workers.tasks.reference:run",
    Params,
    Inputs,
    (REFERENCE,),
    gpu=True,
    batch_free="batch_size",
    shards=True,
)
