"""Differences: let layers of a quantized model read differences between steps, with ranges found in closed loop."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.differences import DifferencesFit
from quant_spec.record import Seed
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(DifferencesFit, TaskParams):
    """The layers that may, and how."""

    layers: tuple[str, ...]
    seed: Seed


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration, the state of each unit, in running order, and what an error of each
    step does to the final sample, if bits are chosen by it."""

    model: Source
    calibration: tuple[Source, ...]
    states: tuple[Source, ...]
    gains: Source | None = None


KIND = TaskKind("differences", 1, "workers.tasks.differences:run", Params, Inputs, (f"{STATE}:*",), gpu=True)
