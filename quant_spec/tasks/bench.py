"""Bench: a release and its original in float32, bfloat16 and compiled bfloat16, measured side by side."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from quant_spec.enums import KernelBackend
from quant_spec.record import Count, Positive
from quant_spec.sampler import Sampler
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

RELEASE, ORIGINAL = "release_figures", "original_figures"
HALF, COMPILED = "bf16_figures", "bf16_compiled_figures"
#: Ways of calling the models, and of compiling one.
EAGER, GRAPH = "eager", "CUDA graph"
WHOLE, BY_BLOCK = "whole", "by block"
#: What is measured side by side, as people call it, and its key among the figures.
BENCHED = {"this model": RELEASE, "float32": ORIGINAL, "bfloat16": HALF, "bfloat16, compiled": COMPILED}


class Params(TaskParams):
    """What is timed, and for how long."""

    sampler: Sampler
    batches: tuple[Count, ...] = Field(description="Batch sizes whose step is timed.")
    seconds: Positive = Field(description="How long each is timed at least.")
    backend: KernelBackend
    compile: bool = Field(description="Whether to measure the compiled original too.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The release's tree, and the original's."""

    artifact: Source
    model: Source


KIND = TaskKind("bench", 3, "workers.tasks.bench:run", Params, Inputs, gpu=True)
