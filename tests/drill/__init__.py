"""A kind of task that exists in tests alone: it runs out of memory, and waits, as it is told."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import Field

from quant_spec.record import Count
from quant_spec.task import TaskInputs, TaskKind, TaskParams
from workers.execution.context import TaskContext, TaskOutput


class Params(TaskParams):
    """What goes wrong."""

    name: str
    batch_size: Count = 1
    fits: Count = Field(default=1024, description="With a larger batch, memory runs out.")
    until: str | None = Field(default=None, description="A file that the task waits for.")


KIND = TaskKind("drill", 1, "tests.drill:run", Params, TaskInputs, ("blob",), gpu=True, batch_free="batch_size")


def run(params: Params, inputs: TaskInputs[str], context: TaskContext) -> TaskOutput:
    """Do as told."""
    if params.batch_size > params.fits:
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
    while params.until is not None and not Path(params.until).exists():
        time.sleep(0.02)
    return TaskOutput({"blob": context.store.put_bytes(params.name.encode())}, {"batch": params.batch_size})
