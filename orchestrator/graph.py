"""Tasks as the planner sees them: nodes of a graph that have a name before anything has run.

A task's *id* is the digest of its kind, code version, parameters and inputs, where an input that another task will
produce stands as that task's id and the output's name. Its *key* is the same digest with every input resolved to the
digest of its bytes; it is known once the inputs exist, and names the result (docs/adr/0001-shape.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.resources import Resources as Resources
from quant_spec.keys import task_digest
from quant_spec.kinds import KINDS


@dataclass(frozen=True, slots=True)
class TaskRef:
    """The output named `output` of the task whose id is `task`."""

    task: str
    output: str


@dataclass(frozen=True, slots=True)
class TaskNode:
    """One task of a graph; made by `task_node`.

    `resources`, `work` (GMAC, for estimates) and `label` say how to run and show it and are no part of its name.
    """

    id: str
    kind: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, tuple[str | TaskRef, ...]]
    resources: Resources
    work: float = 0.0
    label: str = ""

    def sources(self) -> set[str]:
        """Return the ids of the tasks whose outputs this one reads."""
        return {item.task for items in self.inputs.values() for item in items if isinstance(item, TaskRef)}


def inputs_json(inputs: Mapping[str, Sequence[str | TaskRef]]) -> dict[str, list[Any]]:
    """Return inputs as JSON: a digest as text, a reference as `{"task": id, "output": name}`."""
    return {
        name: [{"task": item.task, "output": item.output} if isinstance(item, TaskRef) else item for item in items]
        for name, items in inputs.items()
    }


_ONE_CPU = Resources()


def task_node(
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Sequence[str | TaskRef]],
    *,
    resources: Resources = _ONE_CPU,
    work: float = 0.0,
    label: str = "",
    version: int | None = None,
) -> TaskNode:
    """Make a node and name it.

    Parameters
    ----------
    kind
        A key of `quant_spec.kinds.KINDS`.
    params
        JSON; canonical, so that 1 and 1.0 name different tasks.
    inputs
        Name to what is read, in order: digests, or outputs of other tasks.
    resources, work, label
        How to run and show it; `work` in GMAC.
    version
        Code version of the kind; that of `KINDS` by default.

    Raises
    ------
    KeyError
        If `version` is not given and the kind is unknown.
    ValueError
        If `params` holds a number that is not finite.
    """
    number = KINDS[kind].version if version is None else version
    return TaskNode(
        id=task_digest(kind, number, params, inputs_json(inputs)),
        kind=kind,
        version=number,
        params=params,
        inputs={name: tuple(items) for name, items in inputs.items()},
        resources=resources,
        work=work,
        label=label,
    )
