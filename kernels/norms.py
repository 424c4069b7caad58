"""Normalize and quantize in one go: GroupNorm + SiLU of a ResNet block, LayerNorm + modulation of a transformer block.

What they save is the normalized tensor's trip to memory and back: 2 reads and 1 write of the activation, where norm,
SiLU and quantization apart take 4 and 3. The codes agree with the reference's except where float32 rounding of the norm
moves a value across the middle between two codes; then they differ by one (`NORM_CODE_SHARE` bounds how often).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import (
    ActivationTable,
    QuantizedActivation,
    check_bits,
    fake_quantized,
    quantize_by_table_reference,
    quantize_dynamic_reference,
    table_steps,
)
from kernels.backend import backend_for, is_traced
from kernels.errors import KernelError
from kernels.fp8 import Fp8Matrix, quantize_fp8_reference, to_fp8
from quant_spec.enums import KernelBackend

# Norms of a few thousand terms agree within some 2**-21; a code then flips for that share of the 2 * 256 half steps.
NORM_CODE_SHARE = 2.0**-10
MAX_TOKEN = 16384


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """A group norm over channels; `weight` and `bias` have shape (C,) or are both None."""

    groups: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """A layer norm over channels with the modulation of adaLN: norm(x) * multiplier[b] + shift[b].

    `weight` and `bias` have shape (C,), `multiplier` (1 + scale in the papers) and `shift` (B, C); each may be None,
    the latter two together.
    """

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = None


def group_norm_quantize(
    x: Tensor,
    norm: GroupNorm,
    table: ActivationTable,
    index: Tensor | None = None,
    *,
    silu: bool = True,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> QuantizedActivation:
    """Quantize silu(group_norm(x)), or group_norm(x), by a table.

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype
        Channels last.
    norm : GroupNorm
    table, index, backend
        As for `kernels.activations.quantize_by_table`.
    silu : bool

    Returns
    -------
    QuantizedActivation

    Raises
    ------
    KernelError
        If shapes disagree or bits are not in 2..8.
    """
    channels = x.shape[-1]
    if channels % norm.groups or (norm.weight is None) != (norm.bias is None):
        raise KernelError(
            f"group norm: got {channels} channels in {norm.groups} groups, wanted a multiple, and affine both or none"
        )
    _check_affine(channels, norm.weight, norm.bias)
    steps = table_steps(x, table, index)
    quantize = _group_norm_quantize if is_traced(x) else _group_norm
    codes, scale, zero = quantize(
        x, norm.groups, norm.weight, norm.bias, norm.eps, silu,
        table.scale, table.zero_point, steps, table.divisor, table.bits, str(backend),
    )  # fmt: skip
    return QuantizedActivation(codes, scale, zero, table.symmetric)


def layer_norm_quantize(
    x: Tensor,
    norm: LayerNorm,
    grid: ActivationTable | int,
    index: Tensor | None = None,
    *,
    symmetric: bool = False,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> QuantizedActivation:
    """Quantize layer_norm(x) * multiplier + shift by a table, or dynamically per token.

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype, C at most 16384
    norm : LayerNorm
    grid : ActivationTable or int
        An int: that many bits, on each token's own range. Tables with divisors of channels are not fused.
    index, backend
        As for `kernels.activations.quantize_by_table`.
    symmetric : bool
        Of dynamic grids; a table says so itself.

    Returns
    -------
    QuantizedActivation

    Raises
    ------
    KernelError
        If shapes disagree, bits are not in 2..8, or `x` is empty and its range is asked for.
    """
    _check_layer_norm(x, norm)
    if isinstance(grid, int):
        check_bits(grid)
        if x.numel() == 0:
            raise KernelError(f"layer norm: got an empty tensor of shape {tuple(x.shape)}, wanted values for a range")
        scale, zero_point, steps, bits = None, None, None, grid
    else:
        if grid.divisor is not None:
            raise KernelError("layer norm: got a table with divisors of channels, wanted one without")
        steps = table_steps(x, grid, index)
        scale, zero_point, bits, symmetric = grid.scale, grid.zero_point, grid.bits, grid.symmetric
    quantize = _layer_norm_quantize if is_traced(x) else _layer_norm
    codes, run_scale, zero = quantize(
        x, norm.weight, norm.bias, norm.eps, norm.multiplier, norm.shift,
        scale, zero_point, steps, bits, symmetric, str(backend),
    )  # fmt: skip
    return QuantizedActivation(codes, run_scale, zero, symmetric)


def layer_norm_quantize_fp8(
    x: Tensor,
    norm: LayerNorm,
    scale: Tensor | None = None,
    index: Tensor | None = None,
    *,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> Fp8Matrix:
    """Convert layer_norm(x) * multiplier + shift to E4M3.

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype, C at most 16384, not empty
    norm : LayerNorm
    scale : Tensor, shape (S,), dtype float32, or None
        What is divided by at each entry of a table; None: each token's largest magnitude / 448.
    index : Tensor, shape (), (1,) or (B,), int64, or None
        The entry, of all or of each sample; None if there is one.
    backend : KernelBackend

    Returns
    -------
    Fp8Matrix
        A scale for each token. Numbers are the reference's, but for those that float32 rounding of the norm moves
        across the middle between two.

    Raises
    ------
    KernelError
        If shapes disagree, or `x` is empty.
    """
    _check_layer_norm(x, norm)
    if x.numel() == 0:
        raise KernelError(f"layer norm: got an empty tensor of shape {tuple(x.shape)}, wanted values")
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.norms import launch_layer_norm_fp8

        affine, modulation = (norm.weight, norm.bias, norm.eps), (norm.multiplier, norm.shift)
        with torch.cuda.device_of(x):
            return Fp8Matrix(*launch_layer_norm_fp8(x, affine, modulation, scale, index))
    y = layer_norm_reference(x, norm.weight, norm.bias, norm.eps, norm.multiplier, norm.shift)
    if scale is None:
        return Fp8Matrix(*quantize_fp8_reference(y))
    rows = math.prod(x.shape[:-1])
    by = scale if index is None else scale.index_select(0, index.reshape(-1))
    by = by.float().view(-1, 1).expand(-1, rows // by.numel()).reshape(-1)
    return Fp8Matrix(to_fp8(y, by.view(*x.shape[:-1], 1)), by)


def group_norm_reference(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """Normalize (B, ..., C) in float32 with plain torch."""
    image = x.float().movedim(-1, 1)
    affine = (None if weight is None else weight.float(), None if bias is None else bias.float())
    y = F.group_norm(image, groups, *affine, eps=eps).movedim(1, -1)
    return F.silu(y) if silu else y


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, multiplier: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Normalize and modulate (B, ..., C) in float32 with plain torch."""
    affine = (None if weight is None else weight.float(), None if bias is None else bias.float())
    y = F.layer_norm(x.float(), x.shape[-1:], *affine, eps=eps)
    if multiplier is None or shift is None:
        return y
    per_sample = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    return y * multiplier.float().view(per_sample) + shift.float().view(per_sample)


def _check_layer_norm(x: Tensor, norm: LayerNorm) -> None:
    """Refuse channels that are too many, and weights or modulations of other shapes."""
    batch, channels = x.shape[0], x.shape[-1]
    if channels > MAX_TOKEN:
        raise KernelError(f"layer norm: got {channels} channels, wanted at most {MAX_TOKEN}")
    _check_affine(channels, norm.weight, norm.bias)
    for name, value in (("multiplier", norm.multiplier), ("shift", norm.shift)):
        if (norm.multiplier is None) != (norm.shift is None) or (
            value is not None and value.shape != (batch, channels)
        ):
            shape = None if value is None else tuple(value.shape)
            raise KernelError(f"modulation {name}: got {shape}, wanted ({batch}, {channels}), both or neither")


def _check_affine(channels: int, *vectors: Tensor | None) -> None:
    """Refuse weights and biases that are not those of `channels` channels."""
    for each in vectors:
        if each is not None and each.shape != (channels,):
            raise KernelError(f"norm: got weight or bias of shape {tuple(each.shape)}, wanted {(channels,)}")


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.norms import launch_group_norm

        with torch.cuda.device_of(x):
            return launch_group_norm(x, groups, weight, bias, eps, silu, (scale, zero_point, index, divisor, bits))
    y = group_norm_reference(x, groups, weight, bias, eps, silu)
    return quantize_by_table_reference(y, scale, zero_point, index, divisor, bits)


_group_norm_quantize = torch.library.custom_op("quantmill::group_norm_quantize", _group_norm, mutates_args=())


@_group_norm_quantize.register_fake
def _(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantized(x, 1 if index is None else index.numel())


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    index: Tensor | None,
    bits: int,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.norms import launch_layer_norm

        modulation = (multiplier, shift)
        with torch.cuda.device_of(x):
            return launch_layer_norm(x, (weight, bias, eps), modulation, (scale, zero_point, index, bits), symmetric)
    y = layer_norm_reference(x, weight, bias, eps, multiplier, shift)
    if scale is None or zero_point is None:
        return quantize_dynamic_reference(y, math.prod(x.shape[:-1]), bits, symmetric)
    return quantize_by_table_reference(y, scale, zero_point, index, None, bits)


_layer_norm_quantize = torch.library.custom_op("quantmill::layer_norm_quantize", _layer_norm, mutates_args=())


@_layer_norm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    multiplier: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
    index: Tensor | None,
    bits: int,
    symmetric: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = math.prod(x.shape[:-1]) if scale is None else 1 if index is None else index.numel()
    return fake_quantized(x, runs)
