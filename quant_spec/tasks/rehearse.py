"""Rehearse: a sampler's steps with noise for predictions, to see whether its arithmetic gives samples at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quant_spec.sampler import Sampler
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams


class Params(TaskParams):
    """The sampler, whose scheduler is named, and the whole config of that scheduler."""

    sampler: Sampler
    scheduler_config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """None: no model is called."""


KIND = TaskKind("rehearse", 1, "workers.tasks.rehearse:run", Params, Inputs)
