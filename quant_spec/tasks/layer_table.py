"""Layers: the format of each quantized layer of a release, and how it runs on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass

from quant_spec.enums import KernelBackend
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams


class Params(TaskParams):
    """The backend that it is loaded for."""

    backend: KernelBackend


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree."""

    artifact: Source


KIND = TaskKind("layers", 1, "workers.tasks.layer_table:run", Params, Inputs)
