"""Distill: tune all units of a quantized model together, on full-precision trajectories."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.passes.distill import DistillFit
from quant_spec.record import Seed
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

STATE = "state"


class Params(DistillFit, TaskParams):
    """How the model is distilled."""

    seed: Seed


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, reference shards with predictions, the state of each unit, in running order, and what an error
    of each step does to the final sample, if steps are weighted by it."""

    model: Source
    trajectories: tuple[Source, ...]
    states: tuple[Source, ...]
    gains: Source | None = None


KIND = TaskKind("distill", 4, "workers.tasks.distill:run", Params, Inputs, (f"{STATE}:*",), reports=True, gpu=True)
