"""Step bits: choose the activation bits of each trajectory step from their measured effects."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.step_bits import StepBitsChoice
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STEP_BITS = "step_bits"


class Params(StepBitsChoice, TaskParams):
    """How bits are chosen."""


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Shards of effects."""

    effects: tuple[Source, ...]


KIND = TaskKind("step_bits", 3, "workers.tasks.step_bits:run", Params, Inputs, (STEP_BITS,))
