"""Evaluate: sample a shard of seeds with the packed model, loaded from its files as a user loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.enums import SampleSpace
from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

EVALUATION = "evaluation"


class Params(TaskParams):
    """How to sample."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    samples: SampleSpace = Field(description="Whether samples are pixels.")
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The packed tree, and the reference of the same seeds; of a pipeline also the model's tree and prompts."""

    packed: Source
    reference: Source
    model: Source | None = None
    prompts: Source | None = None
    embeddings: Source | None = None


KIND = TaskKind(
    "evaluate", 2, "workers.tasks.evaluate:run", Params, Inputs, (EVALUATION,), gpu=True, batch_free="batch_size"
)
