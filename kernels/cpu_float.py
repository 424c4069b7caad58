"""Linear and Conv2d on a CPU by its float operators: quantized activations times a weight that is unpacked once.

For layers whose integers a CPU can't multiply exactly (`kernels.cpu_weight`), or whose inputs are no integers that it
takes. Both factors are what codes stand for, as in the definition (`kernels.affine`), so a product differs from the
reference's by the order of float32 additions alone; a weight takes 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import native
from kernels.conv import ConvGeometry
from kernels.cpu_activation import CpuGrid, quantize_cpu
from kernels.differences import Held
from kernels.epilogue import Epilogue
from kernels.gemm import check_weights
from kernels.norms import GroupNorm
from kernels.weights import PackedWeight, expand_weight_groups, row_chunks, weight_integers


@dataclass(frozen=True, slots=True)
class FloatWeight:
    """What a layer's codes stand for.

    Attributes
    ----------
    values : Tensor, shape (N, C) or (N, C, kh, kw) with channels last, dtype float32
    geometry : ConvGeometry or None
        None for a Linear.
    """

    values: Tensor
    geometry: ConvGeometry | None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.values.numel() * self.values.element_size()


def unpack_float_weight(weights: Sequence[PackedWeight], geometry: ConvGeometry | None = None) -> FloatWeight:
    """Unpack a layer's weight; parameters as of `kernels.cpu_weight.pack_cpu_weight`."""
    channels, taps = weights[0].layout.channels, 1 if geometry is None else geometry.taps
    n = check_weights(weights, taps=taps, channels=channels)
    matrix = torch.empty(n, taps, channels)
    for weight in weights:
        outputs = torch.arange(weight.rows) if weight.channel is None else weight.channel.long()
        for rows in row_chunks(weight.rows, taps * channels):
            some = weight.some(rows)
            scale = some.scale.float()
            scale = expand_weight_groups(scale, some.layout) if some.layout.has_group_scales else scale[:, :, None]
            matrix[outputs[rows]] = weight_integers(some).float() * scale
    if geometry is None:
        return FloatWeight(matrix[:, 0], None)
    return FloatWeight(matrix.view(n, *geometry.kernel, channels).permute(0, 3, 1, 2), geometry)


def quantized_values(
    x: Tensor, grid: CpuGrid, bits: int, *, norm: GroupNorm | None = None, silu: bool = False
) -> Tensor:
    """Return what the codes of `x`, (..., C), stand for, float32; parameters as of `quantize_cpu`.

    Channels that are divided by more than the scale stay divided.
    """
    if native.is_usable():
        held = Held(torch.empty(x.shape), grid.scale, is_first=True)
        native.quantize(
            x, grid.step, grid.zero_point, bits, with_sums=False, padding=(0, 0), norm=norm, silu=silu, held=held
        )
        return held.values
    codes = quantize_cpu(x, grid, bits, norm=norm, silu=silu).codes
    runs = codes.view(grid.scale.numel(), -1).float()
    return runs.sub_(grid.zero_point[:, None].float()).mul_(grid.scale[:, None]).view(x.shape)


def float_product(x: Tensor, weight: FloatWeight, epilogue: Epilogue) -> Tensor:
    """Multiply or convolve float32 rows.

    Parameters
    ----------
    x : Tensor, shape (..., C), or (B, H, W, C) for a Conv2d, dtype float32
    weight : FloatWeight
    epilogue : Epilogue
        Without a low-rank branch.

    Returns
    -------
    Tensor, shape (..., N), or (B, OH, OW, N), dtype `epilogue.dtype`

    Raises
    ------
    KernelError
        If the terms do not fit the output.
    """
    bias = None if epilogue.bias is None else epilogue.bias.float()
    if weight.geometry is None:
        out = F.linear(x, weight.values, bias)
    else:
        at = weight.geometry
        image = x.permute(0, 3, 1, 2)
        out = F.conv2d(image, weight.values, bias, at.stride, at.padding, at.dilation).permute(0, 2, 3, 1)
    epilogue.check(tuple(out.shape))
    if epilogue.residual is not None:
        out = out.add_(epilogue.residual)
    return out.to(epilogue.dtype)
