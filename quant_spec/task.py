"""What the description of a kind of task is made of."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Generic, Self, TypeVar

from pydantic import Field

from quant_spec.errors import InvalidInputError
from quant_spec.record import Count, Record, Seed

#: What stands for one input: a digest when a task runs, or a reference to another task's output when it is planned.
Source = TypeVar("Source")


class TaskParams(Record):
    """What a task is told: everything, besides its inputs, that decides the bytes of its outputs, and nothing else."""

    @classmethod
    def of(cls, settings: Record, **own: Any) -> Self:
        """Return the parameters that have a record's fields among their own."""
        shared = cls.model_fields.keys() & type(settings).model_fields.keys() - own.keys()
        return cls(**{name: getattr(settings, name) for name in shared}, **own)


@dataclass(frozen=True, slots=True)
class TaskInputs(Generic[Source]):
    """What a task reads, by name: one source each, or several in order; those that are optional may be missing."""

    @classmethod
    def from_json(cls, data: Mapping[str, Sequence[Source]]) -> Self:
        """Read names and digests.

        Raises
        ------
        InvalidInputError
            If a name is unknown or missing, or has not as many digests as are wanted.
        """
        several = _several(cls)  # type: ignore[arg-type]  # mypy: type[Self] is not Hashable
        if unknown := sorted(data.keys() - several.keys()):
            raise InvalidInputError(f"inputs: got {', '.join(unknown)}, wanted {', '.join(several)}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in data:
                if field.default is MISSING:
                    raise InvalidInputError(f"input {field.name}: got none, wanted it")
                continue
            found = tuple(data[field.name])
            if not several[field.name] and len(found) != 1:
                raise InvalidInputError(f"input {field.name}: got {len(found)} digests, wanted 1")
            if not found and field.default == ():
                raise InvalidInputError(f"input {field.name}: got 0 digests, wanted some, or no such input")
            values[field.name] = found if several[field.name] else found[0]
        return cls(**values)

    def to_json(self) -> dict[str, tuple[Source, ...]]:
        """Return names and sources, without what is missing."""
        found: dict[str, tuple[Source, ...]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value == () and field.default == ()):
                found[field.name] = value if isinstance(value, tuple) else (value,)
        return found


@cache
def _several(cls: type[TaskInputs[Any]]) -> dict[str, bool]:
    """Return the names of inputs, and whether each has several sources."""
    hints = typing.get_type_hints(cls)
    return {field.name: typing.get_origin(hints[field.name]) is tuple for field in fields(cls)}


@dataclass(frozen=True, slots=True)
class TaskKind:
    """A kind of task.

    Attributes
    ----------
    name
        As in the queue.
    version
        Of the code: part of every task's key. Raise it whenever the same parameters and inputs would give other bytes,
        and whenever a parameter is added that older code would ignore: a node of an older release would store, under
        the new parameter's key, a result that knows nothing of it.
    entry
        "module:function" of the body, resolved in the worker only.
    params, inputs
        What it is told, and what it reads.
    outputs
        Names of what it gives; "name:*" is one for each of some units.
    trees
        Those outputs that are trees: manifests that name other blobs, which may be another task's.
    reports
        Its tasks are long and say how far they are.
    gpu
        A GPU helps: its body computes on the device that it is given.
    batch_free
        Name of the parameter that says how many samples go through the model at once, where the result does not depend
        on it but for rounding: a task that ran out of memory is tried again with less. None if there is none.
    shards
        Its body can spread the model over several GPUs of one node, where one is too small for it.
    """

    name: str
    version: int
    entry: str
    params: type[TaskParams] = TaskParams
    inputs: type[TaskInputs[Any]] = TaskInputs
    outputs: tuple[str, ...] = ()
    reports: bool = False
    gpu: bool = False
    batch_free: str | None = None
    shards: bool = False
    trees: tuple[str, ...] = ()

    def check_outputs(self, names: Sequence[str]) -> None:
        """Raise InvalidInputError unless these are names of outputs of this kind."""
        families = {output.removesuffix("*") for output in self.outputs if output.endswith(":*")}
        for name in names:
            family = f"{name.partition(':')[0]}:"
            if name not in self.outputs and family not in families:
                raise InvalidInputError(f"task {self.name}: got output {name}, wanted {', '.join(self.outputs)}")


class Seeds(Record):
    """Consecutive seeds."""

    first: Seed
    count: Count

    @property
    def range(self) -> range:
        """The seeds themselves."""
        return range(self.first, self.first + self.count)


class UnitsParams(TaskParams):
    """What tasks on a group of units are told, whatever they do."""

    seed: Seed
    forward_batch_size: Count = Field(description="Samples through the whole model at once.")


def per_unit(output: str, unit: str) -> str:
    """Return the name of the output that belongs to one unit."""
    return f"{output}:{unit}"
