"""Run one task in this process: find its body by name, give it a store and an empty folder, time it."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from quant_spec.errors import InvalidInputError
from quant_spec.keys import task_key
from quant_spec.kinds import KINDS
from quant_spec.task import TaskInputs, TaskKind, TaskParams
from workers.errors import RefusedError, TaskError
from workers.execution.cluster import CPU, CUDA, host_name, own_versions, version_problem
from workers.execution.context import TaskContext, TaskOutput
from workers.execution.devices import (
    TaskDevice,
    deterministic_algorithms,
    free_gpu,
    read_peaks,
    reset_peaks,
    take_device,
)
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
    occupies; `threads` is how many it may use. `node` and `host` are the id and the name of the node that it is for, ""
    for any; `gpu_type` is what its GPUs are called. `batch_divisor` makes batches smaller that the result does not
    depend on; `deterministic` asks for torch's deterministic algorithms. `versions` are those that the orchestrator
    has; a worker with others refuses. `devices` are all that a task with several GPUs has.
    A call that runs for longer than `deadline_seconds` is taken away. `brief` says that others of its kind took
    milliseconds, so that it goes to a worker together with others.
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
    node: str = ""
    host: str = ""
    gpu_type: str | None = None
    batch_divisor: int = 1
    deterministic: bool = False
    versions: dict[str, str] | None = None
    devices: Sequence[str] = ()
    deadline_seconds: float | None = None
    brief: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the call as JSON."""
        # Not asdict, which copies parameters and inputs through and through.
        return {name: getattr(self, name) for name in self.__slots__}


def execute_call(call: TaskCall) -> TaskOutput:
    """Run a task's body in this process.

    Returns
    -------
    TaskOutput
        The body's, with two more metrics: `seconds` (of the body) and `peak_rss_bytes` (the most memory that this
        process held meanwhile), and with where it `ran`.

    Raises
    ------
    RefusedError
        If this worker has other versions than the orchestrator, or no CUDA device for a task that is to have one.
    TaskError
        If the kind is unknown, this worker's code has another version of it (its result must not be filed under that
        name), parameters or inputs are not those that the kind has, or its body returned something else.
    Exception
        Whatever the body raises.
    """
    host = call.host or host_name()
    if problem := version_problem(own_versions(), call.versions or {}, host):
        raise RefusedError(problem)
    kind = _kind(call)
    params, inputs = _records(kind, call)
    # Without a GPU of the cluster's, the device is the user's own choice, which the body checks.
    device = take_device(call.device, call.gpu_type, host) if call.gpus > 0 else TaskDevice(call.device, CPU)
    body = load_body(kind)
    _set_threads(call.threads)
    reset_peaks(device)
    try:
        with (
            deterministic_algorithms(call.deterministic),
            _store(call) as store,
            ExitStack() as stack,
        ):
            started = time.perf_counter()
            scratch = cache(lambda: stack.enter_context(own_folder(Path(call.cache_dir) / "scratch")))
            notes = TaskNotes(store, task_key(kind.name, kind.version, call.params, call.inputs))
            # Of a task that was given several logical GPUs, each is the CPU.
            devices = tuple(call.devices) if device.name.startswith(CUDA) else (device.name,) * len(call.devices)
            context = TaskContext(store, device.name, scratch, call.threads, notes, devices)
            output = body(_smaller_batches(kind, params, call.batch_divisor), inputs, context)
            seconds = time.perf_counter() - started
            notes.clear()
        peaks = read_peaks(device)
    finally:
        free_gpu()
    if not isinstance(output, TaskOutput):
        raise TaskError(f"task {kind.name}: got {type(output).__name__} from its body, wanted TaskOutput")
    try:
        kind.check_outputs(list(output.outputs))
    except InvalidInputError as error:
        raise TaskError(str(error)) from error
    ran = {"node": host, "device": device.type, "versions": dict(own_versions()), **peaks}
    metrics = {**output.metrics, "seconds": seconds, "peak_rss_bytes": peaks["peak_rss_bytes"]}
    return TaskOutput(output.outputs, metrics, ran)


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


def _smaller_batches(kind: TaskKind, params: TaskParams, divisor: int) -> TaskParams:
    """Return parameters with smaller batches; they still name the same task, whose result does not depend on them."""
    if kind.batch_free is None or divisor <= 1:
        return params
    return params.replaced(**{kind.batch_free: max(1, getattr(params, kind.batch_free) // divisor)})


def _set_threads(threads: int) -> None:
    """Limit torch, if the body needed it at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


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
