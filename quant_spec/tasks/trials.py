"""Trials: what quantizing each part of a group of units alone does to the final samples.

The damages are JSON: {"inputs": {layer: x}, "products": {attention: x}, "weights": {layer: x}}, x the mean square error
of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.prompts import PromptPart
from quant_spec.record import Count
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

DAMAGES = "damages"


class Params(TaskParams):
    """How to sample, and whether weights are tried."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    weights: bool
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, the states of the group's units; and a pipeline's prompts."""

    model: Source
    states: tuple[Source, ...]
    prompts: Source | None = None


KIND = TaskKind("trials", 1, "workers.tasks.trials:run", Params, Inputs, (DAMAGES,), gpu=True)
