"""How far the long tasks of a job are that run now, as they say themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.db.rows import TaskRow
from orchestrator.states import TaskState
from orchestrator.text import human_seconds
from quant_spec.kinds import KINDS
from workers.execution.notes import TaskProgress, read_progress
from workers.storage.store import Store

#: Kinds whose tasks say how far they are.
REPORTING = tuple(kind.name for kind in KINDS.values() if kind.reports)


@dataclass(frozen=True, slots=True)
class RunningTask:
    """A running task and how far it is."""

    kind: str
    label: str
    progress: TaskProgress

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        left = self.progress.seconds_left
        steps = {"done": self.progress.done, "total": self.progress.total}
        return {
            "kind": self.kind,
            "label": self.label,
            **steps,
            "seconds_left": None if left is None else round(left, 1),
        }


def step_text(step: Mapping[str, Any]) -> str:
    """Return a running task's document in a few words."""
    left = "" if step["seconds_left"] is None else f", about {human_seconds(step['seconds_left'])} left"
    return f"{step['kind']} at step {step['done']}/{step['total']}{left}"


def running_tasks(tasks: Iterable[TaskRow], store: Store) -> tuple[RunningTask, ...]:
    """Return those of some tasks that run now and have said how far they are."""
    found = []
    for task in tasks:
        if task.kind in REPORTING and task.state is TaskState.RUNNING and task.key is not None:
            progress = read_progress(store, task.key)
            if progress is not None:
                found.append(RunningTask(task.kind, task.label, progress))
    return tuple(found)
