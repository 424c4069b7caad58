"""Calibrate: record the exact denoiser inputs along the trajectories of a shard of seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

CALIBRATION = "calibration"


class Params(TaskParams):
    """How to sample, and what of it to record."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    steps: Count | None = Field(description="Trajectory steps recorded, evenly spread; null is all.")
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree; for a whole pipeline that is told prompts, a file of them, and what they encode to."""

    model: Source
    prompts: Source | None = None
    embeddings: Source | None = None


KIND = TaskKind(
    "calibrate",
    1,
    "workers.tasks.calibrate:run",
    Params,
    Inputs,
    (CALIBRATION,),
    gpu=True,
    batch_free="batch_size",
    shards=True,
)
