"""What a task body is given, and what it returns.

A body is `def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.execution.notes import TaskNotes
from workers.storage.store import NodeStore

#: A task's parameters: JSON.
Params = dict[str, Any]
#: A task's inputs: name to the digests of the bytes read, in order.
Inputs = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class TaskContext:
    """Where a task runs.

    `store` reads through the node's cache; `device` is torch's name of the device; `scratch` is an empty folder that
    is removed when the task ends; `threads` is how many the body may use; `notes` takes checkpoints and progress, None
    outside of a queue.
    """

    store: NodeStore
    device: str
    scratch: Path
    threads: int
    notes: TaskNotes | None = None


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What a task gives back: `outputs`, names to digests of blobs that it stored, and `metrics`, JSON."""

    outputs: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
