"""Errors of the workers.

WorkerError
├── StoreError                  the object store (exit code 1)
│   ├── StoreUnreachableError   when it is opened: no such folder, bucket, endpoint, or no right to it (2)
│   ├── StoreUnavailableError   in the middle of work: 5xx, throttled, no answer, read-only, a right that was lost (1)
│   │   └── StoreFullError      no room left in the store (2; also a DiskFullError)
│   ├── DiskFullError           no room left where bytes are written (2)
│   ├── DigestMismatchError     the bytes are not those that their digest names (2)
│   └── NotFoundError           no blob of that digest (102)
├── ManifestError               a manifest or a path in it that is not acceptable (2)
├── ModelError                  a model folder that cannot be used (2)
├── TaskError                   a task cannot run with what it was given (2)
├── TaskFailedError             a task that ran in a process of its own failed there (1)
└── ExecutorError               Ray cannot be started or reached (1)

`fault_of` says what an exception means to the queue, `dependency_of` what it was that a task could not do without.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from enum import StrEnum

from quant_spec.errors import InvalidInputError, QuantServiceError
from workers.urls import hide_passwords


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


class DigestMismatchError(StoreError, InvalidInputError):
    """The bytes are not those that their digest names."""

    exit_code = 2


class NotFoundError(StoreError):
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


class TaskFailedError(WorkerError):
    """A task that ran in a process of its own failed there, or the process died."""


class ExecutorError(WorkerError):
    """Ray cannot be started or reached."""


class Fault(StrEnum):
    """What an exception means to the queue.

    TASK: the task's own error, tried a few times. INFRASTRUCTURE: a worker, node or lease was lost; counted apart and
    tried more often. OUTAGE: something that every task needs is out; counts as nothing, and the task runs when it is
    back. INVALID: bad input, never tried again.
    """

    TASK = "task"
    INFRASTRUCTURE = "infrastructure"
    OUTAGE = "outage"
    INVALID = "invalid"


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
    if dependency_of(error) is not None:
        return Fault.OUTAGE
    # A bad read may pass, on this node or on another.
    if isinstance(error, DigestMismatchError):
        return Fault.TASK
    return Fault.INVALID if isinstance(error, InvalidInputError) else Fault.TASK


def describe(error: BaseException) -> str:
    """Return one line for an exception: its message, preceded by its class when it is not one of ours; no passwords."""
    lines = str(error).split("\n")
    text = hide_passwords(" ".join(line.strip() for line in lines if line.strip()))
    if isinstance(error, QuantServiceError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
