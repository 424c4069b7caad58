"""Which task made what: the edges of the graph, from a task back to everything that it depends on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import CTE, Text, cast, or_, select
from sqlalchemy.orm import Session

from orchestrator.db.models import Job, JobTask, Result, Task, TaskInput, in_states
from orchestrator.db.sql import dump
from orchestrator.db.statements import batches
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.states import TaskState
from quant_spec.kinds import KINDS

#: The columns of an edge that is inserted.
EDGE = ("task_seq", "source_seq", "places")


def read_places(node: TaskNode) -> dict[str, str]:
    """Return the tasks that a task reads, and where the outputs of each go: `task_inputs.places`, as JSON."""
    places: dict[str, list[tuple[str, int, str]]] = {}
    for name, items in node.inputs.items():
        for position, item in enumerate(items):
            if isinstance(item, TaskRef):
                places.setdefault(item.task, []).append((name, position, item.output))
    return {source: _places_json(tuple(each)) for source, each in places.items()}


@lru_cache(maxsize=4096)
def _places_json(places: tuple[tuple[str, int, str], ...]) -> str:
    return dump(places)


def referring_inputs(session: Session, tasks: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the inputs of tasks as they were planned: a reference where another task's output belongs.

    A row of an older release does not say where it belongs; then the digest that was read stays.
    """
    inputs: dict[str, dict[str, list[Any]]] = {}
    for batch in batches(tasks):
        numbers: dict[int, str] = {}
        for row in session.execute(select(Task.seq, Task.id, Task.inputs).where(Task.id.in_(batch))):
            numbers[row.seq] = row.id
            inputs[row.id] = {name: list(items) for name, items in row.inputs.items()}
        edges = select(TaskInput.task_seq, Task.id, TaskInput.places).join(Task, Task.seq == TaskInput.source_seq)
        for edge in session.execute(edges.where(TaskInput.task_seq.in_(numbers))):
            for name, position, output in edge.places or ():
                inputs[numbers[edge.task_seq]][name][position] = {"task": edge.id, "output": output}
    return inputs


def ancestry(tasks: Sequence[str]) -> CTE:
    """Return the numbers of tasks and of all that they depend on, as a table for another query."""
    found = select(Task.seq).where(Task.id.in_(tasks)).cte("ancestry", recursive=True)
    return found.union(select(TaskInput.source_seq).join(found, TaskInput.task_seq == found.c.seq))


def tree_outputs(session: Session, tasks: Sequence[str]) -> set[str]:
    """Return the digests of all trees that these tasks depend on or have made, their jobs' models among them."""
    kinds = {name: kind.trees for name, kind in KINDS.items() if kind.trees}
    own = ancestry(tasks)
    statement = select(Result.kind, Result.outputs).join(Task, Task.key == Result.key)
    rows = session.execute(statement.where(Task.seq.in_(select(own.c.seq)), Result.kind.in_(kinds)))
    trees = {row.outputs[name] for row in rows for name in kinds[row.kind] if name in row.outputs}
    models = select(Job.model_digest).join(JobTask, JobTask.job_id == Job.id).where(JobTask.task_id.in_(tasks))
    return trees | set(session.scalars(models))


def makers(session: Session, tasks: Sequence[str], blobs: Collection[str]) -> dict[str, str]:
    """Return the keys of recorded results among what tasks depend on that name one of these blobs, each with its kind.

    The tasks' own results are looked at too.
    """
    own = ancestry(tasks)
    named = or_(*[cast(Result.outputs, Text).contains(digest) for digest in sorted(blobs)])
    keys = select(Task.key).where(Task.seq.in_(select(own.c.seq)))
    rows = session.execute(select(Result.key, Result.kind).where(Result.key.in_(keys), named))
    return {row.key: row.kind for row in rows}


def is_outdated(session: Session, task: str, inputs: Mapping[str, Sequence[Any]]) -> bool:
    """Say whether a task that is about to read `inputs` would be given others now: what it reads was made again."""
    edges = select(TaskInput.places, Result.outputs).join(Task, Task.seq == TaskInput.source_seq)
    reader = select(Task.seq).where(Task.id == task).scalar_subquery()
    edges = edges.join(Result, Result.key == Task.key).where(TaskInput.task_seq == reader)
    return any(
        inputs[name][position] != row.outputs.get(output)
        for row in session.execute(edges)
        for name, position, output in row.places or ()
    )


def recorded_outputs(session: Session, task: str) -> dict[str, bool]:
    """Return the digests of the outputs of a task that has succeeded, and whether each is a tree; none of any other."""
    statement = select(Result.kind, Result.outputs).join(Task, Task.key == Result.key)
    row = session.execute(statement.where(Task.id == task, in_states(Task.state, [TaskState.SUCCEEDED]))).one_or_none()
    if row is None:
        return {}
    trees = KINDS[row.kind].trees if row.kind in KINDS else ()
    return {digest: name in trees for name, digest in row.outputs.items()}
