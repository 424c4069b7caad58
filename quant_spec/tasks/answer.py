"""Answer: choose the codes of all rounded units again, for what the quantized layers before each give."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.passes.round import AnswerFit
from quant_spec.planned import Ranges
from quant_spec.record import Seed
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(AnswerFit, TaskParams):
    """What the codes are chosen from."""

    ranges: dict[str, Ranges] = Field(description="How the range of each layer's weight is found.")
    seed: Seed


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration, and the state of each unit."""

    model: Source
    calibration: tuple[Source, ...]
    states: tuple[Source, ...]


KIND = TaskKind("answer", 1, "workers.tasks.answer:run", Params, Inputs, (f"{STATE}:*",), gpu=True)
