"""Which implementation of the low-bit primitives runs.

`reference` is plain torch on any device and defines what the others compute. `auto` takes the fastest that this
installation has for the device.
"""

from __future__ import annotations

from enum import StrEnum

from kernels.errors import KernelError


class KernelBackend(StrEnum):
    """Choice of implementation; `AUTO` resolves to one of the others."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    CPU = "cpu"


AVAILABLE_BACKENDS = (KernelBackend.REFERENCE,)


class BackendUnavailableError(KernelError):
    """The backend asked for is not in this installation."""


def resolve_backend(backend: KernelBackend | str) -> KernelBackend:
    """Turn a choice into the backend that will run.

    Raises
    ------
    KernelError
        If `backend` is not one of the names of `KernelBackend`.
    BackendUnavailableError
        If it is, but this installation does not have it.
    """
    try:
        choice = KernelBackend(backend)
    except ValueError:
        raise KernelError(f"backend: got {str(backend)!r}, wanted one of {', '.join(KernelBackend)}") from None
    if choice is KernelBackend.AUTO:
        return AVAILABLE_BACKENDS[0]
    if choice not in AVAILABLE_BACKENDS:
        available = ", ".join(AVAILABLE_BACKENDS)
        raise BackendUnavailableError(
            f"backend: got {choice.value!r}, which this version does not have; wanted auto or {available}"
        )
    return choice
