"""Correct: fit PTQD's correction to the noise of a packed model, and pack it with a sampler that applies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from quant_spec.passes.correct import CorrectFit
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

PACKED = "packed"


class Params(CorrectFit, TaskParams):
    """What is corrected."""

    channel_dim: Literal[1, -1] = Field(description="Of the predictions: 1 for images, -1 for tokens.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The packed tree, shards of moments to fit, and those of other seeds, which decide what is used."""

    packed: Source
    noise: tuple[Source, ...]
    held_out: tuple[Source, ...]


KIND = TaskKind("correct", 1, "workers.tasks.correct:run", Params, Inputs, (PACKED,), trees=(PACKED,))
