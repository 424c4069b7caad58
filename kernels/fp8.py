"""Linear layers with FP8 (E4M3) weights and activations, an option on GPUs with FP8 tensor cores (sm_89 and up).

    x8 = to_e4m3(clamp(x / x_scale[m], -448, 448)),   y = x_scale[m] * scale[n] * sum_k x8[m, k] * w8[n, k]

What lies outside of +-448 saturates, infinities too, and NaN stays NaN: E4M3 (`torch.float8_e4m3fn`) has no infinity.
Where a scale is taken of the row itself, a row with an infinity or NaN has no finite scale, and becomes NaN.

Products of E4M3 numbers are exact in float32; their sum is not, and its order is the backend's (`FP8_TOLERANCE`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import backend_for, is_traced
from kernels.epilogue import Epilogue, EpilogueRows, add_epilogue, add_gated, without_gate
from kernels.errors import KernelError
from kernels.gemm import as_rows, epilogue_rows
from quant_spec.enums import KernelBackend

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_FLOOR = 1e-12
# What N and K are multiples of in PyTorch's product.
LIBRARY_MULTIPLE = 16
# Relative to the sum of |terms|. Hopper's FP8 tensor cores keep about 13 bits of a running sum; Triton adds those to
# float32 registers, but not more often than once per block.
FP8_TOLERANCE = 2.0**-10


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """E4M3 numbers and the scale of each row.

    Attributes
    ----------
    values : Tensor, shape (..., K), dtype float8_e4m3fn
    scale : Tensor, shape (rows,), dtype float32, > 0
    switches : tuple of int
        Of a weight: numbers of rows of a call, rising, from each of which on the other product is taken, first
        PyTorch's and then ours again (`kernels.fp8_measure`); none: always ours.
    """

    values: Tensor
    scale: Tensor
    switches: tuple[int, ...] = ()


def quantize_fp8(x: Tensor, backend: KernelBackend | str = KernelBackend.AUTO) -> Fp8Matrix:
    """Convert to E4M3 with one scale for each row (last dimension), max|x| / 448.

    Parameters
    ----------
    x : Tensor, shape (..., K), floating dtype, not empty
        A weight (N, K) or an activation.
    backend : KernelBackend

    Returns
    -------
    Fp8Matrix
        The same bits on each backend: maxima are exact, divisions true, conversion to nearest even. A row with an
        infinity or NaN has no finite scale.

    Raises
    ------
    KernelError
        If `x` is empty.
    """
    if x.numel() == 0:
        raise KernelError(f"fp8: got an empty tensor of shape {tuple(x.shape)}, wanted values")
    return Fp8Matrix(*(_quantize_fp8 if is_traced(x) else _by_rows)(x, str(backend)))


def why_no_fp8(device: torch.device) -> str | None:
    """Say why the Triton kernels of this module don't run on a device; None if they do.

    gfx942 has another 8-bit format, and GPUs before sm_89 none.
    """
    if device.type != "cuda":
        return None  # the interpreter, which emulates E4M3
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 9):
        return f"FP8: got {torch.cuda.get_device_name(device)}, wanted an NVIDIA GPU of sm_89 or later"
    return None


def linear_fp8(
    x: Fp8Matrix, weight: Fp8Matrix, epilogue: Epilogue, backend: KernelBackend | str = KernelBackend.AUTO
) -> Tensor:
    """Multiply FP8 activations (..., K) with an FP8 weight (N, K).

    Returns
    -------
    Tensor, shape (..., N), dtype `epilogue.dtype`

    Raises
    ------
    KernelError
        If shapes disagree.
    """
    if weight.values.dim() != 2 or x.values.shape[-1] != weight.values.shape[1]:
        raise KernelError(
            f"fp8: got {tuple(x.values.shape)} and {tuple(weight.values.shape)}, wanted (..., K) and (N, K)"
        )
    shape = (*x.values.shape[:-1], weight.values.shape[0])
    epilogue.check(shape, gated=True)
    values = as_rows(x.values)
    if sum(len(values) >= switch for switch in weight.switches) % 2 and library_takes(weight, epilogue):
        return linear_fp8_library(x, weight, epilogue)
    rows = epilogue_rows(epilogue)
    left = Fp8Matrix(values, x.scale.contiguous())
    right = Fp8Matrix(weight.values.contiguous(), weight.scale.contiguous())
    if not is_traced(values):
        return _multiply_fp8(left, right, rows, epilogue.dtype, str(backend)).view(shape)
    plain = rows if rows.gate is None else without_gate(rows)
    out = _linear_fp8(
        left.values, left.scale, right.values, right.scale,
        plain.bias, plain.residual, plain.down, plain.up, epilogue.dtype, str(backend),
    )  # fmt: skip
    return (out if rows.gate is None else add_gated(out, rows, epilogue.dtype)).view(shape)


def library_takes(weight: Fp8Matrix, epilogue: Epilogue) -> bool:
    """Whether `linear_fp8_library` has a product's shape and epilogue: a bias at most, and outputs in bfloat16."""
    fits = all(size % LIBRARY_MULTIPLE == 0 for size in weight.values.shape)
    more = (epilogue.residual, epilogue.low_rank, epilogue.gate)
    return fits and epilogue.dtype is torch.bfloat16 and all(each is None for each in more)


def linear_fp8_library(x: Fp8Matrix, weight: Fp8Matrix, epilogue: Epilogue) -> Tensor:
    """Multiply as `linear_fp8` by `torch._scaled_mm`, which rounds a bias to bfloat16 before it adds it.

    Raises
    ------
    RuntimeError, NotImplementedError
        If PyTorch has no such product on this device.
    """
    values = as_rows(x.values)
    bias = None if epilogue.bias is None else epilogue.bias.to(epilogue.dtype)
    out = torch._scaled_mm(
        values.contiguous(), weight.values.t(), scale_a=x.scale.view(-1, 1), scale_b=weight.scale.view(1, -1),
        bias=bias, out_dtype=epilogue.dtype, use_fast_accum=False,
    )  # fmt: skip
    return out.view(*x.values.shape[:-1], weight.values.shape[0])


def fp8_scale(most: Tensor) -> Tensor:
    """Return the scale at which magnitudes up to `most`, any shape, fill E4M3's range: most / 448, above a floor."""
    return (most / torch.full_like(most, FP8_MAX)).clamp(min=SCALE_FLOOR)  # CUDA multiplies by a number's inverse


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Convert `x` / `scale` to E4M3, to the nearest number with ties to even; what is too large saturates.

    Parameters
    ----------
    x : Tensor, any shape, floating dtype
        Computed in float32, with a true division.
    scale : Tensor, broadcastable to `x`, dtype float32, > 0

    Returns
    -------
    Tensor, shape of `x`, dtype float8_e4m3fn
    """
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def fake_quantize_fp8(x: Tensor, scale: Tensor, output_scale: Tensor | None = None) -> Tensor:
    """Convert to E4M3 and back: the numbers that `to_fp8` gives, times `output_scale` (`scale` by default), float32."""
    return to_fp8(x, scale).float() * (scale if output_scale is None else output_scale)


def quantize_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of the Triton kernel."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    scale = fp8_scale(flat.abs().amax(1))
    return to_fp8(flat, scale[:, None]).view(x.shape), scale


def linear_fp8_reference(x: Fp8Matrix, weight: Fp8Matrix, rows: EpilogueRows, dtype: torch.dtype) -> Tensor:
    """Plain-torch twin of the Triton kernel, for rows (M, K)."""
    total = (x.values.double() @ weight.values.double().t()).float()
    return add_epilogue(total * weight.scale * x.scale[:, None], rows, dtype)


def _by_rows(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.fp8 import launch_quantize_fp8

        with torch.cuda.device_of(x):
            return launch_quantize_fp8(x)
    return quantize_fp8_reference(x)


_quantize_fp8 = torch.library.custom_op("quantmill::quantize_fp8", _by_rows, mutates_args=())


@_quantize_fp8.register_fake
def _(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _multiply_fp8(x: Fp8Matrix, weight: Fp8Matrix, rows: EpilogueRows, dtype: torch.dtype, backend: str) -> Tensor:
    """Multiply rows (M, K) on the backend that is asked for."""
    if backend_for(x.values.device, backend) is KernelBackend.TRITON:
        from kernels._triton.fp8 import launch_linear_fp8

        with torch.cuda.device_of(x.values):
            return launch_linear_fp8(x, weight, rows, dtype)
    return linear_fp8_reference(x, weight, rows, dtype)


@torch.library.custom_op("quantmill::linear_fp8", mutates_args=())
def _linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    rows = EpilogueRows(bias, residual, down, up)
    return _multiply_fp8(Fp8Matrix(x, x_scale), Fp8Matrix(weight, scale), rows, dtype, backend)


@_linear_fp8.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
