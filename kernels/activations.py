"""Quantize activations to integer codes: by a table (one grid, or one for each trajectory step), or by their own range.

    code = clamp(round(x / scale) + zero_point, 0, 2**bits - 1)                     as `kernels.affine` defines it
    code = clamp(round(x / divisor[c]) + zero_point, 0, 2**bits - 1)                where channels have divisors

Codes are stored as int8, code - 2**(bits - 1), and so are zero points: the operand of int8 tensor cores. On the CPU
they are uint8 as they are (`kernels.cpu`). Channels are the last dimension: an image is (B, H, W, C).

Kernel and reference agree bit for bit: the quotient is a true division, minima and maxima are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import backend_for, is_traced
from kernels.errors import KernelError
from quant_spec.enums import KernelBackend

SCALE_FLOOR = 1e-8


@dataclass(frozen=True, slots=True)
class QuantizedActivation:
    """Codes of an activation and the grids of its rows.

    Attributes
    ----------
    codes : Tensor, shape (..., C), dtype int8 (uint8 for the CPU backend)
    scale : Tensor, shape (R,), dtype float32
        One for each of R equal runs of rows: 1, the samples, or all rows (tokens).
    zero_point : Tensor, shape (R,), dtype int32
        In the codes' domain: what 0.0 is stored as.
    symmetric : bool
        All zero points are 0, known without looking.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    symmetric: bool


@dataclass(frozen=True, slots=True)
class ActivationTable:
    """The grids of a layer's input.

    Attributes
    ----------
    scale : Tensor, shape (S,), dtype float32, > 0
        One for each trajectory step, or one in all. The caller answers for its values: nothing is checked at run time,
        since that would wait for the device.
    zero_point : Tensor, shape (S,), dtype float32, whole numbers in [0, 2**bits - 1]
    bits : int
        2 to 8.
    symmetric : bool
        All zero points are 2**(bits - 1).
    divisor : Tensor, shape (S, C), dtype float32, > 0, or None
        What each channel is divided by, where that is not the scale. Infinity leaves a channel out: its codes are the
        zero point, whatever it holds.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool = False
    divisor: Tensor | None = None


def quantize_by_table(
    x: Tensor, table: ActivationTable, index: Tensor | None = None, backend: KernelBackend | str = KernelBackend.AUTO
) -> QuantizedActivation:
    """Quantize with the grid of each sample's trajectory step, looked up on the device.

    Parameters
    ----------
    x : Tensor, shape (..., C), floating dtype
    table : ActivationTable
    index : Tensor, shape () or (B,), dtype int64, on the device of `x`
        Steps of the samples; rows of one sample are adjacent. Needed if the table has several entries.
    backend : KernelBackend

    Returns
    -------
    QuantizedActivation
        R is 1 or B.

    Raises
    ------
    KernelError
        If shapes disagree or bits are not in 2..8.
    """
    steps = table_steps(x, table, index)
    quantize = _quantize_by_table if is_traced(x) else _by_table
    codes, scale, zero = quantize(x, table.scale, table.zero_point, steps, table.divisor, table.bits, str(backend))
    return QuantizedActivation(codes, scale, zero, table.symmetric)


def quantize_dynamic(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    per_token: bool,
    channel_scale: Tensor | None = None,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> QuantizedActivation:
    """Quantize with the min-max range of each token (last dimension) or of each sample (first dimension).

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype
    bits : int
        2 to 8.
    symmetric : bool
        Zero point 2**(bits - 1); else the range [min(x, 0), max(x, 0)].
    per_token : bool
    channel_scale : Tensor, shape (C,), dtype float32, > 0, optional
        Ranges are those of x / channel_scale, and so are the codes: channels are divided by scale * channel_scale.
    backend : KernelBackend

    Returns
    -------
    QuantizedActivation
        R is the number of rows, or B.

    Raises
    ------
    KernelError
        If bits are not in 2..8, `x` is empty, or `channel_scale` has another shape.
    """
    check_bits(bits)
    if channel_scale is not None and channel_scale.shape != x.shape[-1:]:
        raise KernelError(f"channel_scale: got shape {tuple(channel_scale.shape)}, wanted {tuple(x.shape[-1:])}")
    if x.numel() == 0:
        raise KernelError(f"dynamic activation: got an empty tensor of shape {tuple(x.shape)}, wanted values")
    runs = math.prod(x.shape[:-1]) if per_token else x.shape[0]
    codes, scale, zero = _quantize_dynamic(x, runs, bits, symmetric, channel_scale, str(backend))
    return QuantizedActivation(codes, scale, zero, symmetric)


def minmax_grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and unsigned zero point of the grid that covers [low, high] and 0, both float32.

    Divisors are tensors, since CUDA multiplies by the rounded inverse of a number.
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = (torch.maximum(-low, high) / torch.full_like(high, top // 2)).clamp(min=SCALE_FLOOR)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / torch.full_like(high, top)).clamp(min=SCALE_FLOOR)
    return scale, torch.round(-low / scale).clamp(0, top)


def signed_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return code - 2**(bits - 1), int8, for parameters that broadcast to `x`; `zero_point` is unsigned."""
    codes = (x.float() / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.sub_(2 ** (bits - 1)).to(torch.int8)


def quantize_by_table_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor, index: Tensor | None, divisor: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin of the Triton kernel: codes (int8), scales (R,), signed zero points (R,)."""
    divisor = gather_steps(scale if divisor is None else divisor, index)
    scale, zero = gather_steps(scale, index), gather_steps(zero_point, index)
    runs = x.reshape(len(scale), -1, x.shape[-1])
    codes = signed_codes(runs, divisor.view(len(scale), 1, -1), zero.view(-1, 1, 1), bits).view(x.shape)
    return codes, scale, (zero - 2 ** (bits - 1)).to(torch.int32)


def quantize_dynamic_reference(
    x: Tensor, runs: int, bits: int, symmetric: bool, channel_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin of the Triton kernels: codes (int8), scales (R,), signed zero points (R,)."""
    flat = x.reshape(runs, -1, x.shape[-1]).float()
    scale, zero, divisor = dynamic_grid(flat, bits, symmetric, channel_scale)
    codes = signed_codes(flat, divisor, zero.view(-1, 1, 1), bits).view(x.shape)
    return codes, scale, (zero - 2 ** (bits - 1)).to(torch.int32)


def dynamic_grid(
    runs: Tensor, bits: int, symmetric: bool, channel_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales (R,), unsigned zero points (R,) and divisors (R, 1, 1 or C) for float32 runs (R, rows, C)."""
    seen = runs if channel_scale is None else runs / channel_scale
    scale, zero = minmax_grid(seen.amin((1, 2)), seen.amax((1, 2)), bits, symmetric)
    divisor = scale.view(-1, 1, 1)
    return scale, zero, divisor if channel_scale is None else divisor * channel_scale


def gather_steps(table: Tensor, index: Tensor | None) -> Tensor:
    """Return the table's entries for each sample, shape (R,), as a new tensor and without waiting for the device."""
    return table.float().clone() if index is None else table.float().index_select(0, index.reshape(-1))


def table_steps(x: Tensor, table: ActivationTable, index: Tensor | None) -> Tensor | None:
    """Return the entry of each run of rows of `x`, shape (R,); None if the table has one. Refuses what does not fit."""
    check_bits(table.bits)
    rows = math.prod(x.shape[:-1])
    runs = 1 if index is None or len(table.scale) == 1 else index.numel()
    if (index is None and len(table.scale) != 1) or table.scale.shape != table.zero_point.shape:
        raise KernelError(
            f"activation table: got {tuple(table.scale.shape)} scales, {tuple(table.zero_point.shape)} zero points and "
            f"{'no' if index is None else 'an'} index, wanted equal shapes, and an index for several entries"
        )
    if runs == 0 or rows % runs:
        raise KernelError(f"activation rows: got {rows}, wanted a multiple of {runs} samples")
    check_divisor(table, x.shape[-1])
    return None if index is None or len(table.scale) == 1 else index.contiguous()


def check_divisor(table: ActivationTable, channels: int) -> None:
    """Refuse a table whose divisors are not those of `channels` channels."""
    wanted = (len(table.scale), channels)
    if table.divisor is not None and table.divisor.shape != wanted:
        raise KernelError(f"divisor: got shape {tuple(table.divisor.shape)}, wanted {wanted}")


def check_bits(bits: int) -> None:
    """Refuse a width that codes do not have."""
    if not 2 <= bits <= 8:
        raise KernelError(f"activation bits: got {bits}, wanted 2 to 8")


def _by_table(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.activations import launch_by_table

        with torch.cuda.device_of(x):
            return launch_by_table(x, scale, zero_point, index, divisor, bits)
    return quantize_by_table_reference(x, scale, zero_point, index, divisor, bits)


_quantize_by_table = torch.library.custom_op("quantmill::quantize_by_table", _by_table, mutates_args=())


@_quantize_by_table.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = 1 if index is None else index.numel()
    return fake_quantized(x, runs)


def _dynamic(
    x: Tensor, runs: int, bits: int, symmetric: bool, channel_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.activations import launch_dynamic

        with torch.cuda.device_of(x):
            return launch_dynamic(x, runs, bits, symmetric, channel_scale)
    return quantize_dynamic_reference(x, runs, bits, symmetric, channel_scale)


_quantize_dynamic = torch.library.custom_op("quantmill::quantize_dynamic", _dynamic, mutates_args=())


@_quantize_dynamic.register_fake
def _(
    x: Tensor, runs: int, bits: int, symmetric: bool, channel_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantized(x, runs)


def fake_quantized(x: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of codes, scales and zero points, for operators under compilation."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(runs, dtype=torch.float32), x.new_empty(runs, dtype=torch.int32)
