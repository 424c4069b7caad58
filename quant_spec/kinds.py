"""Every kind of task: its name, the version of its code, and where its body is.

A body's version enters the key of its tasks; raise it whenever the same parameters and inputs would give other bytes,
and whenever a parameter is added that older code would ignore: a node of an older release would store, under the new
parameter's key, a result that knows nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskKind:
    """A kind of task; `entry` is "module:function", resolved in the worker only.

    `reports`: its tasks are long and say how far they are (`workers.execution.notes`).
    """

    name: str
    version: int
    entry: str
    reports: bool = False


_ALL = (
    TaskKind("inspect", 3, "workers.tasks.inspect:run"),
    TaskKind("calibrate", 1, "workers.tasks.calibrate:run"),
    TaskKind("reference", 1, "workers.tasks.reference:run"),
    TaskKind("temporal", 1, "workers.tasks.temporal:run"),
    TaskKind("scale", 2, "workers.tasks.scale:run"),
    TaskKind("round", 1, "workers.tasks.round:run"),
    TaskKind("reconstruct", 1, "workers.tasks.reconstruct:run"),
    TaskKind("step_effects", 1, "workers.tasks.step_effects:run"),
    TaskKind("step_bits", 2, "workers.tasks.step_bits:run"),
    TaskKind("channel_errors", 3, "workers.tasks.channel_errors:run"),
    TaskKind("allocate", 2, "workers.tasks.allocate:run"),
    TaskKind("distill", 2, "workers.tasks.distill:run", reports=True),
    TaskKind("pack", 2, "workers.tasks.pack:run"),
    TaskKind("noise", 1, "workers.tasks.noise:run"),
    TaskKind("correct", 1, "workers.tasks.correct:run"),
    TaskKind("evaluate", 1, "workers.tasks.evaluate:run"),
    TaskKind("score", 1, "workers.tasks.score:run"),
    TaskKind("release", 1, "workers.tasks.release:run"),
    # Run at once for the command line, not queued.
    TaskKind("export", 1, "workers.tasks.export:run"),
    TaskKind("bench", 2, "workers.tasks.bench:run"),
    TaskKind("layers", 1, "workers.tasks.layer_table:run"),
    TaskKind("card", 1, "workers.tasks.card:run"),
    # Neither computes nor needs a model: measures the queue and drills its recovery.
    TaskKind("noop", 1, "workers.tasks.noop:run"),
)

#: Name to kind.
KINDS: dict[str, TaskKind] = {kind.name: kind for kind in _ALL}
