"""Run one task in this process: find its body by name, give it a store and an empty folder, time it."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quant_spec.errors import InvalidInputError
from quant_spec.keys import task_key
from quant_spec.kinds import KINDS
from quant_spec.task import TaskInputs, TaskKind, TaskParams
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.execution.notes import TaskNotes
from workers.storage.locks import own_folder
from workers.storage.patient import PatientStore
from workers.storage.store import CACHE_LIMIT_BYTES, NodeStore, open_cached


@dataclass(frozen=True, slots=True)
class TaskCall:
    """Everything that a worker needs to run a task; JSON.

    `params` and `inputs` (name to digests, in order) are as the kind's records write them. `store_url` is as for
    `workers.storage.store.open_store`; `cache_dir` is the node's cache of at most `cache_bytes`, and scratch folders
    lie in it too. `device` is torch's name of what to compute on. `cpus`, `gpus` and `memory_bytes` are what the task
    occupies; `threads` is how many it may use. A call that runs for longer than `deadline_seconds` is taken away.
    """

    kind: str
    params: dict[str, Any]
    inputs: dict[str, list[str]]
    store_url: str
    cache_dir: str
    cache_bytes: int = CACHE_LIMIT_BYTES
    device: str = "cpu"
    threads: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    version: int | None = None
    deadline_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the call as JSON."""
        return asdict(self)


def execute_call(call: TaskCall) -> TaskOutput:
    """Run a task's body in this process.

    Returns
    -------
    TaskOutput
        The body's, with two more metrics: `seconds` (of the body) and `peak_rss_bytes` (the most memory that this
        process has held so far).

    Raises
    ------
    TaskError
        If the kind is unknown, this worker's code has another version of it (its result must not be filed under that
        name), parameters or inputs are not those that the kind has, or its body returned something else.
    Exception
        Whatever the body raises.
    """
    kind = _kind(call)
    params, inputs = _records(kind, call)
    body = load_body(kind)
    _set_threads(call.threads)
    with _store(call) as store, own_folder(Path(call.cache_dir) / "scratch") as scratch:
        started = time.perf_counter()
        notes = TaskNotes(store, task_key(kind.name, kind.version, call.params, call.inputs))
        output = body(params, inputs, TaskContext(store, call.device, scratch, call.threads, notes))
        seconds = time.perf_counter() - started
        notes.clear()
    _free_gpu()
    if not isinstance(output, TaskOutput):
        raise TaskError(f"task {kind.name}: got {type(output).__name__} from its body, wanted TaskOutput")
    try:
        kind.check_outputs(list(output.outputs))
    except InvalidInputError as error:
        raise TaskError(str(error)) from error
    return TaskOutput(output.outputs, {**output.metrics, "seconds": seconds, "peak_rss_bytes": _peak_rss_bytes()})


def _kind(call: TaskCall) -> TaskKind:
    """Return what is called, in the version that this code has."""
    if call.kind not in KINDS:
        raise TaskError(f"task: got kind {call.kind!r}, wanted one of {', '.join(sorted(KINDS))}")
    kind = KINDS[call.kind]
    if call.version not in (None, kind.version):
        raise TaskError(f"task {kind.name}: got version {call.version}, wanted {kind.version}, which this code has")
    return kind


def _records(kind: TaskKind, call: TaskCall) -> tuple[TaskParams, TaskInputs[str]]:
    """Read parameters and inputs: whatever the kind does not have, or not under these parameters, is refused."""
    try:
        return kind.params.from_json(call.params), kind.inputs.from_json(call.inputs)
    except InvalidInputError as error:
        raise TaskError(f"task {kind.name}: {error}") from error


def load_body(kind: TaskKind) -> Callable[[Any, Any, TaskContext], TaskOutput]:
    """Import the body of a kind; it takes the kind's own parameters and inputs."""
    module, _, name = kind.entry.partition(":")
    body: Callable[[Any, Any, TaskContext], TaskOutput] = getattr(importlib.import_module(module), name)
    return body


def _set_threads(threads: int) -> None:
    """Limit torch, if the body needed it at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _free_gpu() -> None:
    """Give cached GPU memory back, as other workers may share the GPU before this process runs its next task."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# A worker runs one task after another against the same store; opening S3 takes a tenth of a second.
_opened = lru_cache(maxsize=4)(open_cached)


@contextmanager
def _store(call: TaskCall) -> Iterator[NodeStore]:
    """Open a store, and give up the files in use at the end."""
    store = _opened(call.store_url, Path(call.cache_dir), call.cache_bytes)
    try:
        yield PatientStore(store)
    finally:
        store.release()


def _peak_rss_bytes() -> int:
    """Return the most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
