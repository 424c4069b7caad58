"""Where a task body runs, and what it returns.

A body is `def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput`, with the records of its
kind from `quant_spec.tasks`; an input is the digest of the bytes read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.execution.notes import TaskNotes
from workers.storage.store import NodeStore


@dataclass(frozen=True, slots=True)
class TaskContext:
    """Where a task runs.

    `store` reads through the node's cache; `device` is torch's name of the device; `threads` is how many the body may
    use; `notes` takes checkpoints and progress, None outside of a queue. `devices` are all that the task has, where
    these are several. `make_scratch` makes the folder of `scratch` or finds it: most short tasks need none.
    """

    store: NodeStore
    device: str
    make_scratch: Callable[[], Path]
    threads: int
    notes: TaskNotes | None = None
    devices: tuple[str, ...] = ()

    @property
    def scratch(self) -> Path:
        """An empty folder at first, removed when the task ends."""
        return self.make_scratch()


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What a task gives back: `outputs`, names to digests of blobs that it stored, and `metrics`, JSON.

    `ran` is JSON about where: node, device, versions, peaks of memory; the body leaves it empty.
    """

    outputs: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    ran: dict[str, Any] = field(default_factory=dict)
