"""Linear layers on packed weights: integer activations (W8A8, W4A8, W2A8 and mixes) and float ones (W4A16).

    y = x_scale[m] * sum_g scale[n, g] * I[m, n, g],   I = sum_k (x[m, k] - x_zero[m]) * (w[n, k] - zero[n, g])

Where groups have whole numbers in place of scales, w[n, k] - zero[n, g] is multiplied with them, and there is one sum.

I is exact: an integer, equal on every backend bit for bit. Each backend gets it from int8 products and corrections,
    I = sum x w' - x_zero * total,   w' = w - zero in registers (up to 4 bits), else
    I = sum x w - zero * sum x - x_zero * total,
and rounds it to float32 once. After that the order of float32 additions may differ (`EPILOGUE_TOLERANCE`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.activations import QuantizedActivation
from kernels.backend import backend_for, is_traced
from kernels.epilogue import Epilogue, EpilogueRows, LowRank, add_epilogue, add_gated, without_gate
from kernels.errors import KernelError
from kernels.weights import PackedWeight, WeightLayout, weight_integers
from quant_spec.enums import KernelBackend

# Relative to the sum of |terms| of an output value. Float32 keeps 24 bits; a group's scaled sum, each addition of the
# next group, bias, rank and residual round once, in an order (and with a fused multiply-add) that is the backend's own.
EPILOGUE_TOLERANCE = 2.0**-20
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TENSORS_PER_WEIGHT, _INTS_PER_WEIGHT = 7, 7


def linear_int(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    epilogue: Epilogue,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> Tensor:
    """Multiply quantized activations with a packed weight, in integers.

    Parameters
    ----------
    x : QuantizedActivation
        Codes of shape (..., K), dtype int8; one scale and zero point for all rows, or for each of R equal runs of rows.
    weights : sequence of PackedWeight
        One that holds all output channels, or several that divide them, each with its own bits.
    epilogue : Epilogue
        Output dtype and what is added.
    backend : KernelBackend
        AUTO takes Triton on a GPU, else the reference.

    Returns
    -------
    Tensor, shape (..., N), dtype `epilogue.dtype`
        Contiguous.

    Raises
    ------
    KernelError
        If shapes disagree.
    """
    n = check_weights(weights, taps=1, channels=x.codes.shape[-1])
    shape = (*x.codes.shape[:-1], n)
    epilogue.check(shape, gated=True)
    rows, codes = epilogue_rows(epilogue), as_rows(x.codes)
    if not len(x.scale) or len(codes) % len(x.scale):
        raise KernelError(f"linear: got {len(x.scale)} scales for {len(codes)} rows, wanted equal runs of rows")
    if not is_traced(x.codes):
        flat = QuantizedActivation(codes, x.scale.contiguous(), x.zero_point.contiguous(), x.symmetric)
        return _multiply_int(flat, weights, rows, n, epilogue.dtype, str(backend)).view(shape)
    plain = rows if rows.gate is None else without_gate(rows)
    out = _linear_int(
        codes,
        x.scale.contiguous(),
        x.zero_point.contiguous(),
        x.symmetric,
        *flatten_weights(weights),
        plain.bias,
        plain.residual,
        plain.down,
        plain.up,
        n,
        epilogue.dtype,
        str(backend),
    )
    return (out if rows.gate is None else add_gated(out, rows, epilogue.dtype)).view(shape)


def linear_float(
    x: Tensor,
    weights: Sequence[PackedWeight],
    epilogue: Epilogue,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> Tensor:
    """Multiply float activations with a packed weight that is dequantized in registers (W4A16, W8A16).

    Parameters
    ----------
    x : Tensor, shape (..., K), dtype float16, bfloat16 or float32
    weights, epilogue, backend
        As for `linear_int`.

    Returns
    -------
    Tensor, shape (..., N), dtype `epilogue.dtype`

    Raises
    ------
    KernelError
        If shapes disagree, or `x` has another dtype.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise KernelError(f"x: got dtype {x.dtype}, wanted one of {', '.join(map(str, FLOAT_DTYPES))}")
    n = check_weights(weights, taps=1, channels=x.shape[-1])
    shape = (*x.shape[:-1], n)
    epilogue.check(shape, gated=True)
    rows = epilogue_rows(epilogue)
    if not is_traced(x):
        return _multiply_float(as_rows(x), weights, rows, n, epilogue.dtype, str(backend)).view(shape)
    plain = rows if rows.gate is None else without_gate(rows)
    out = _linear_float(
        as_rows(x),
        *flatten_weights(weights),
        plain.bias,
        plain.residual,
        plain.down,
        plain.up,
        n,
        epilogue.dtype,
        str(backend),
    )
    return (out if rows.gate is None else add_gated(out, rows, epilogue.dtype)).view(shape)


def linear_int_reference(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weights: Sequence[PackedWeight], rows: EpilogueRows, n: int
) -> Tensor:
    """Plain-torch twin of the integer kernels, before the output's dtype: (M, K) codes to float32 (M, N)."""
    m = codes.shape[0]
    per_scale = m // len(scale)
    x = (codes.int() - zero_point.repeat_interleave(per_scale)[:, None]).double()
    out = torch.empty(m, n, dtype=torch.float32, device=codes.device)
    for weight in weights:
        values = weight_integers(weight)[:, 0].double()  # (rows, K); sums below 2**53 are exact in float64
        total = torch.zeros(m, weight.rows, device=codes.device)
        size = weight.layout.group_size if weight.layout.has_group_scales else values.shape[1]
        for group, start in enumerate(range(0, values.shape[1], size)):
            integers = x[:, start : start + size] @ values[:, start : start + size].t()
            total += integers.float() * weight.scale[:, group].float()
        channel = slice(None) if weight.channel is None else weight.channel.long()
        out[:, channel] = total * scale.repeat_interleave(per_scale)[:, None]
    return add_epilogue(out, rows, torch.float32)


def linear_float_reference(x: Tensor, weights: Sequence[PackedWeight], rows: EpilogueRows, n: int) -> Tensor:
    """Plain-torch twin of the float kernels: the integers code - zero point, scaled after each group's float32 sum."""
    out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    for weight in weights:
        values = weight_integers(weight)[:, 0].float()
        total = torch.zeros(x.shape[0], weight.rows, device=x.device)
        size = weight.layout.group_size if weight.layout.has_group_scales else values.shape[1]
        for group, start in enumerate(range(0, values.shape[1], size)):
            part = slice(start, start + size)
            total += (x[:, part].float() @ values[:, part].t()) * weight.scale[:, group].float()
        channel = slice(None) if weight.channel is None else weight.channel.long()
        out[:, channel] = total
    return add_epilogue(out, rows, torch.float32)


def check_weights(weights: Sequence[PackedWeight], *, taps: int, channels: int) -> int:
    """Return the number of output channels that `weights` divide among them; raise KernelError if they do not fit."""
    for weight in weights:
        if (weight.layout.taps, weight.layout.channels) != (taps, channels):
            raise KernelError(
                f"weight: got {weight.layout.taps} taps of {weight.layout.channels} channels, "
                f"wanted {taps} of {channels}"
            )
    if not weights or (len(weights) > 1 and any(weight.channel is None for weight in weights)):
        raise KernelError(f"weights: got {len(weights)} parts, wanted one, or several that name their output channels")
    return sum(weight.rows for weight in weights)


def flatten_weights(weights: Sequence[PackedWeight]) -> tuple[list[Tensor], list[int]]:
    """Turn records into what a registered operator may take: tensors (an empty one for an absent one) and integers."""
    tensors, ints = [], []
    for weight in weights:
        absent = weight.codes.new_empty(0)
        rest = [absent if each is None else each for each in (weight.channel, weight.whole, weight.factor)]
        tensors += [weight.codes, weight.scale, weight.zero_point, weight.total, *rest]
        ints += weight.layout.to_ints()
    return tensors, ints


def unflatten_weights(tensors: Sequence[Tensor], ints: Sequence[int]) -> list[PackedWeight]:
    """Undo `flatten_weights`."""
    weights = []
    for i in range(len(tensors) // _TENSORS_PER_WEIGHT):
        codes, scale, zero, total, *rest = tensors[i * _TENSORS_PER_WEIGHT : (i + 1) * _TENSORS_PER_WEIGHT]
        channel, whole, factor = (each if each.numel() else None for each in rest)
        layout = WeightLayout.from_ints(ints[i * _INTS_PER_WEIGHT : (i + 1) * _INTS_PER_WEIGHT])
        weights.append(PackedWeight(codes, scale, zero, total, channel, layout, whole, factor))
    return weights


def as_rows(x: Tensor) -> Tensor:
    """View (..., K) as (M, K) with contiguous rows; a copy only where strides do not allow a view."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.numel() == 0 else flat.contiguous()


def epilogue_rows(epilogue: Epilogue) -> EpilogueRows:
    """View an epilogue's tensors as rows."""
    residual = None if epilogue.residual is None else as_rows(epilogue.residual)
    bias = None if epilogue.bias is None else epilogue.bias.contiguous()
    gate = epilogue.gate
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    low_rank: LowRank | None = epilogue.low_rank
    if low_rank is None:
        return EpilogueRows(bias, residual, None, None, gate)
    return EpilogueRows(bias, residual, as_rows(low_rank.hidden).contiguous(), low_rank.up.contiguous(), gate)


def _multiply_int(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    rows: EpilogueRows,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Multiply rows (M, K) on the backend that is asked for."""
    if backend_for(x.codes.device, backend) is KernelBackend.TRITON:
        from kernels._triton.gemm import launch_linear_int

        with torch.cuda.device_of(x.codes):
            return launch_linear_int(x, weights, rows, n, dtype)
    return linear_int_reference(x.codes, x.scale, x.zero_point, weights, rows, n).to(dtype)


@torch.library.custom_op("quantmill::linear_int", mutates_args=())
def _linear_int(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    x_symmetric: bool,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    weights, rows = unflatten_weights(weight_tensors, weight_ints), EpilogueRows(bias, residual, down, up)
    x = QuantizedActivation(codes, x_scale, x_zero, x_symmetric)
    return _multiply_int(x, weights, rows, n, dtype, backend)


@_linear_int.register_fake
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    x_symmetric: bool,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return codes.new_empty(codes.shape[0], n, dtype=dtype)


def _multiply_float(
    x: Tensor, weights: Sequence[PackedWeight], rows: EpilogueRows, n: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Multiply float rows (M, K) on the backend that is asked for."""
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.gemm import launch_linear_float

        with torch.cuda.device_of(x):
            return launch_linear_float(x, weights, rows, n, dtype)
    return linear_float_reference(x, weights, rows, n).to(dtype)


@torch.library.custom_op("quantmill::linear_float", mutates_args=())
def _linear_float(
    x: Tensor,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    weights, rows = unflatten_weights(weight_tensors, weight_ints), EpilogueRows(bias, residual, down, up)
    return _multiply_float(x, weights, rows, n, dtype, backend)


@_linear_float.register_fake
def _(
    x: Tensor,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=dtype)
