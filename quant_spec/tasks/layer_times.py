"""Layer times: how long each layer of a model takes in each format, on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.enums import KernelBackend
from quant_spec.record import Bits, Positive
from quant_spec.sampler import Sampler
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams


class Params(TaskParams):
    """Which formats are timed, and for how long."""

    sampler: Sampler
    weight_bits: tuple[Bits, ...]
    activation_bits: tuple[Bits, ...]
    seconds: Positive = Field(description="How long each format is timed at least.")
    backend: KernelBackend


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree, whose layers' granularity, split and scaling are kept, and the original's."""

    artifact: Source
    model: Source


KIND = TaskKind("layer_times", 1, "workers.tasks.layer_times:run", Params, Inputs, gpu=True)
