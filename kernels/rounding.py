"""Closed-form rounding of columns on the CPU, `_rounding.c`: the bytes that tensor operations give, in one call.

Installing the package compiles it where there is a C compiler and Python's headers; without it (`is_built`) callers do
the same with a dozen tensor operations for each column.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels.errors import KernelError

_rounding: ModuleType | None
try:
    from kernels import _rounding
except ImportError:
    _rounding = None

# Weights below which a thread more costs more than it saves.
_THREAD = 1 << 15


def is_built() -> bool:
    """Whether the compiled part is there."""
    return _rounding is not None


def round_columns(
    weight: Tensor,
    numbers: Tensor,
    inverse: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    top: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    """Round the columns from `start` to `stop` of a weight matrix, each error spread over those behind it up to `stop`.

    Parameters
    ----------
    weight : Tensor, shape (C_out, K)
        Changed: what is left to round.
    numbers : Tensor, shape (C_out, K)
        Changed: gets the columns' codes.
    inverse : Tensor, shape (K, K)
        Upper Cholesky factor of the inverse of the input's second moment (GPTQ, Alg. 1).
    scale, zero_point : Tensor, shape (C_out, K)
        Of each weight.
    top : Tensor, shape (C_out,)
        Greatest code of each row.

    Returns
    -------
    Tensor, shape (C_out, stop - start)
        Errors over the factor's diagonal, to be spread over the columns behind `stop`.

    Raises
    ------
    KernelError
        If a tensor is not a contiguous float32 of its shape on the CPU, or the columns are not there.

    Notes
    -----
    All is float32.
    """
    assert _rounding is not None
    rows, columns = weight.shape
    wanted = {"inverse": (columns, columns), "top": (rows,)}
    named = {
        "weight": weight,
        "numbers": numbers,
        "inverse": inverse,
        "scale": scale,
        "zero_point": zero_point,
        "top": top,
    }
    for name, tensor in named.items():
        shape = wanted.get(name, (rows, columns))
        fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not fits or tuple(tensor.shape) != shape:
            got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise KernelError(f"{name}: got {got}, wanted contiguous float32 {shape} on the CPU")
    if not 0 <= start < stop <= columns:
        raise KernelError(f"columns: got {start} to {stop}, wanted some of {columns}")
    errors = torch.empty(rows, stop - start)
    threads = max(1, min(torch.get_num_threads(), rows * (stop - start) // _THREAD))
    addresses = (each.data_ptr() for each in (weight, numbers, errors, inverse, scale, zero_point, top))
    _rounding.round_columns(*addresses, rows, columns, start, stop, threads)
    return errors
