"""Errors of the workers.

WorkerError
├── StoreError                  the object store (exit code 1)
│   ├── StoreUnreachableError   when it is opened: no such folder, bucket, endpoint, or no right to it (2)
│   ├── StoreUnavailableError   in the middle of work: 5xx, throttled, no answer, read-only, a right that was lost (1)
│   │   └── StoreFullError      no room left in the store (2; also a DiskFullError)
│   ├── DiskFullError           no room left where bytes are written (2)
│   └── BlobLostError           a blob that should be there is not, or not as it was written; it knows the digest
│       ├── DigestMismatchError     the bytes are not those that their digest names (2)
│       └── NotFoundError           no blob of that digest (102)
├── ManifestError               a manifest or a path in it that is not acceptable (2)
├── ModelError                  a model folder that cannot be used (2)
├── TaskError                   a task cannot run with what it was given (2)
├── RefusedError                a worker that is not fit for a task (1)
├── TaskFailedError             a task that ran in a process of its own failed there (1)
└── ExecutorError               Ray cannot be started or reached (1)

`fault_of` says what an exception means to the queue, `dependency_of` what it was that a task could not do without.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import StrEnum

from quant_spec.errors import InvalidInputError, QuantServiceError
from workers.urls import hide_passwords, known_secrets


class WorkerError(QuantServiceError):
    """Base of the workers' errors."""


class StoreError(WorkerError):
    """The object store failed."""


class StoreUnreachableError(StoreError, InvalidInputError):
    """The store does not exist, does not answer, or does not let us in."""

    exit_code = 2


class DiskFullError(StoreError, InvalidInputError):
    """There is no room left where bytes are written; nothing partial was left."""

    exit_code = 2


class StoreUnavailableError(StoreError):
    """The store, which was there, does not serve now; nobody's fault but its own, and it may be back at any time."""


class StoreFullError(StoreUnavailableError, DiskFullError):
    """There is no room left in the store; nothing partial was left."""

    exit_code = 2


class BlobLostError(StoreError):
    """A blob is missing or damaged; `digest` says which, so that whoever made it can be asked for it again."""

    def __init__(self, message: str, digest: str) -> None:
        """Say what was found of the blob with this digest."""
        super().__init__(message)
        self.digest = digest


class DigestMismatchError(BlobLostError, InvalidInputError):
    """The bytes are not those that their digest names."""

    exit_code = 2


class NotFoundError(BlobLostError):
    """The store has no blob of that digest."""

    exit_code = 102


class ManifestError(WorkerError, InvalidInputError):
    """A manifest, or a path in it, is not acceptable."""

    exit_code = 2


class ModelError(WorkerError, InvalidInputError):
    """A model folder cannot be used."""

    exit_code = 2


class TaskError(WorkerError, InvalidInputError):
    """A task cannot run with what it was given: kind, version, parameters or inputs."""

    exit_code = 2


class RefusedError(WorkerError):
    """This worker is not fit for the task: no CUDA device, or other versions; elsewhere it runs."""


class TaskFailedError(WorkerError):
    """A task that ran in a process of its own failed there, or the process died."""


class ExecutorError(WorkerError):
    """Ray cannot be started or reached."""


class Fault(StrEnum):
    """What an exception means to the queue.

    TASK: the task's own error, tried a few times. INFRASTRUCTURE: a worker, node or lease was lost; counted apart and
    tried more often. MEMORY: memory ran out, the device's or the host's; counted as infrastructure, tried again alone.
    REFUSED: by a worker that is not fit for it; counted as infrastructure, tried again elsewhere. DEADLINE: it ran for
    longer than it may; counted as infrastructure at first, as a node may be slow, and as its own after that. OUTAGE:
    something that every task needs is out; counts as nothing, and the task runs when it is back. INVALID: bad input,
    never tried again. LOST: a blob that it reads is missing or damaged; it waits until that has been made again.
    """

    TASK = "task"
    INFRASTRUCTURE = "infrastructure"
    MEMORY = "memory"
    REFUSED = "refused"
    DEADLINE = "deadline"
    OUTAGE = "outage"
    INVALID = "invalid"
    LOST = "lost"


#: What CUDA's own libraries say when a device's memory has run out; torch passes it on as a plain RuntimeError.
_NO_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out: Python's own, torch's or Ray's, known by their names."""
    if isinstance(error, MemoryError):
        return True
    for cls in type(error).__mro__:
        if cls.__name__ == "OutOfMemoryError" and cls.__module__.partition(".")[0] in ("torch", "ray"):
            return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


class Dependency(StrEnum):
    """What every task needs. CLUSTER is Ray, and what its nodes lend to a task: their disks and networks."""

    STORE = "store"
    DATABASE = "database"
    CLUSTER = "cluster"


#: What the operating system says when a disk or network is out or full, whoever asks.
OUT = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO,
        errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN,
        errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    }
)  # fmt: skip


def dependency_of(error: BaseException) -> Dependency | None:
    """Return what it was that is out, if an exception, or what caused it, says that something is."""
    for each in _chain(error):
        if isinstance(each, StoreUnavailableError | StoreUnreachableError):
            return Dependency.STORE
        if isinstance(each, DiskFullError) or (isinstance(each, OSError) and each.errno in OUT):
            return Dependency.CLUSTER
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def fault_of(error: BaseException) -> Fault:
    """Return what an exception that left a task's body means to the queue."""
    if isinstance(error, RefusedError):
        return Fault.REFUSED
    if is_out_of_memory(error):
        return Fault.MEMORY
    if isinstance(error, BlobLostError):
        return Fault.LOST
    if dependency_of(error) is not None:
        return Fault.OUTAGE
    return Fault.INVALID if isinstance(error, InvalidInputError) else Fault.TASK


def describe(error: BaseException) -> str:
    """Return one line for an exception: its message, preceded by its class when it is not one of ours; no passwords."""
    lines = str(error).split("\n")
    said = " ".join(line.strip() for line in lines if line.strip())
    text = hide_passwords(said, known_secrets(os.environ))
    if isinstance(error, QuantServiceError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
