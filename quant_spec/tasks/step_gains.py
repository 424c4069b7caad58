"""Step gains: what an error of the prediction at each trajectory step does to the final sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

GAINS = "gains"


class Params(TaskParams):
    """How to sample."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, and the weights of all units at the width whose errors are added; and a pipeline's prompts."""

    model: Source
    states: tuple[Source, ...]
    prompts: Source | None = None


KIND = TaskKind("step_gains", 3, "workers.tasks.step_gains:run", Params, Inputs, (GAINS,), gpu=True)
