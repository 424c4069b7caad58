"""Encode: what a pipeline's text encoders make of prompts, once for all tasks that sample."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

EMBEDDINGS = "embeddings"


class Params(TaskParams):
    """How the pipeline is called, as far as it decides what is encoded (guidance, lengths), and for which seeds."""

    sampler: Sampler
    part: PromptPart = Field(description="Which prompts.")
    seeds: Seeds


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The pipeline's tree and a file of prompts."""

    model: Source
    prompts: Source


KIND = TaskKind("encode", 1, "workers.tasks.encode:run", Params, Inputs, (EMBEDDINGS,), gpu=True)
