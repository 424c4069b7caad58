"""Score: the figures of a packed model over all its evaluation shards, and pictures to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.enums import Extractor, SampleSpace, ShownSeeds
from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

SCORE, GRID, SAMPLES = "score", "grid", "samples"


class Params(TaskParams):
    """The protocol, which the figures repeat; the feature extractor; how many seeds are shown."""

    sampler: Sampler
    seeds: Seeds
    sqnr_seeds: Count = Field(description="Seeds that the per-step SQNR was taken over.")
    extractor: Extractor
    grid: Count = Field(description="Images in the sample grid.")
    samples: SampleSpace = Field(description="Whether samples are pixels.")
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")
    shown: ShownSeeds = Field(default=ShownSeeds.FIRST, description="Which seeds pictures show.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part", "shown"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Packed and original trees; shards in the order of their seeds; files of weights, for inception-v3, CLIP and
    LPIPS; prompts.

    `whole` is the tree of the pipeline that the packed model samples in.
    """

    packed: Source
    references: tuple[Source, ...]
    evaluations: tuple[Source, ...]
    model: Source
    extractor_weights: Source | None = None
    prompts: Source | None = None
    clip: Source | None = None
    lpips: Source | None = None
    whole: Source | None = None


KIND = TaskKind("score", 5, "workers.tasks.score:run", Params, Inputs, (SCORE, GRID, SAMPLES))
