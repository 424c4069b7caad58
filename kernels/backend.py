"""Which implementation of the low-bit primitives runs.

`reference` is plain torch on any device and defines what the others compute. `auto` takes the fastest that this
installation has for the device.

Two questions are asked here. `resolve_backend`: which backend a model is loaded for, on a device. `backend_for`: what
one operator of `kernels` runs on a tensor's device. The CPU backend has operators of its own (`kernels.cpu`,
`kernels.cpu_float`), since its weights are laid out by oneDNN, or unpacked.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from kernels.errors import KernelError
from quant_spec.enums import KernelBackend

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BackendUnavailableError(KernelError):
    """The backend asked for is not in this installation."""


def check_backend(backend: KernelBackend | str) -> KernelBackend:
    """Return the choice that a name means; KernelError if it is none."""
    try:
        return KernelBackend(backend)
    except ValueError:
        raise KernelError(f"backend: got {str(backend)!r}, wanted one of {', '.join(KernelBackend)}") from None


def resolve_backend(backend: KernelBackend | str, device: torch.device) -> KernelBackend:
    """Turn a choice into the backend that a model on `device` is loaded for: never AUTO.

    Raises
    ------
    KernelError
        If `backend` is not one of the names of `KernelBackend`.
    BackendUnavailableError
        If it is, but this installation does not have it, or it does not run on `device`.
    """
    choice = check_backend(backend)
    if choice is KernelBackend.AUTO:
        if device.type == "cuda":
            return KernelBackend.TRITON if has_triton() else KernelBackend.REFERENCE
        return KernelBackend.CPU if device.type == "cpu" else KernelBackend.REFERENCE
    if choice is KernelBackend.TRITON:
        _check_triton(device)
    if choice is KernelBackend.CPU and device.type != "cpu":
        raise BackendUnavailableError(f"backend: got 'cpu' on device {device}, wanted device cpu, auto or reference")
    return choice


def why_reference(choice: KernelBackend | str, device: torch.device) -> str:
    """Say why a model on `device` runs the reference, where `resolve_backend` made that of `choice`."""
    if check_backend(choice) is KernelBackend.REFERENCE:
        return "the reference was asked for"
    return "auto: triton is not installed" if device.type == "cuda" else f"auto: no kernels for device {device.type}"


def has_int8_cpu() -> bool:
    """Whether int8 is multiplied exactly here: by oneDNN without saturation, or by our own product; measures."""
    from kernels.cpu_weight import sums_pairs_exactly
    from kernels.native import product_level

    return sums_pairs_exactly() or bool(product_level())


def prefers_int8_weights(device: torch.device) -> bool:
    """Whether a GPU was seen to multiply many rows fastest with weights of one int8 each."""
    if device.type != "cuda" or not has_triton():
        return False
    from kernels._triton.tuned import HOPPER, chip_of, entries_of

    return any(entry.tile.kernel == HOPPER for entry in entries_of(chip_of(device)))


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def backend_for(device: torch.device, backend: KernelBackend | str = KernelBackend.AUTO) -> KernelBackend:
    """Choose between Triton and the reference for an operator on `device`.

    Raises
    ------
    KernelError
        If `backend` is not one of the names of `KernelBackend`, or has no such operator.
    BackendUnavailableError
        If it is triton, and triton is not installed or does not run on `device`.
    """
    choice = check_backend(backend)
    if choice is KernelBackend.CPU:
        raise KernelError("backend: got 'cpu' for an operator of tensors, wanted the packed operators of kernels.cpu")
    if choice is KernelBackend.AUTO:
        return KernelBackend.TRITON if device.type == "cuda" and has_triton() else KernelBackend.REFERENCE
    if choice is KernelBackend.TRITON:
        _check_triton(device)
    return choice


def is_traced(x: Tensor) -> bool:
    """Whether operators on `x` are looked at as they are called, or `x` has no values: kernels must be registered ones.

    A registered operator costs the host some 80 us a call, more than most kernels take on a GPU.
    """
    import torch

    return x.is_meta or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _check_triton(device: torch.device) -> None:
    """Refuse a device that Triton does not compile for; its interpreter runs on the CPU."""
    if not has_triton():
        raise BackendUnavailableError("backend: got 'triton', which is not installed; wanted auto or reference")
    if device.type != "cuda":
        import triton

        if not triton.knobs.runtime.interpret:
            raise BackendUnavailableError(f"backend: got 'triton' on device {device}, wanted a GPU, auto or reference")
