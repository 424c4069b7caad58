"""Step effects: what activation bits at one trajectory step do to the final samples of a shard of seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from quant_spec.planned import Varied
from quant_spec.prompts import PromptPart
from quant_spec.record import Bits, Count, Seed
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds, Source, TaskInputs, TaskKind, TaskParams

EFFECTS = "effects"


class Params(TaskParams):
    """How to sample, which bits to try, and in which layers."""

    sampler: Sampler
    seeds: Seeds
    batch_size: Count = Field(description="Seeds per denoiser call.")
    choices: tuple[Bits, ...]
    layers: dict[str, Varied]
    seed: Seed
    part: PromptPart | None = Field(default=None, description="Which prompts a whole pipeline is told.")

    _omitted: ClassVar[frozenset[str]] = frozenset({"part"})


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, and the shards that ranges are measured on; and a pipeline's prompts."""

    model: Source
    calibration: tuple[Source, ...]
    prompts: Source | None = None


KIND = TaskKind("step_effects", 1, "workers.tasks.step_effects:run", Params, Inputs, (EFFECTS,), gpu=True)
