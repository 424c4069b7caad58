"""Conv2d on packed weights with integer activations (W8A8, W4A8, W2A8 and mixes), channels last.

The same integers as `kernels.gemm`, summed over taps too. A padded position holds 0.0, whose code is the activation's
zero point; so padding adds nothing to the sum of (x - x_zero) * (w - zero), whatever the zero point is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import QuantizedActivation
from kernels.backend import backend_for, is_traced
from kernels.epilogue import Epilogue, EpilogueRows, add_epilogue
from kernels.errors import KernelError
from kernels.gemm import check_weights, epilogue_rows, flatten_weights, unflatten_weights
from kernels.weights import PackedWeight, weight_integers
from quant_spec.enums import KernelBackend

# Offsets within one image are 32-bit, between images 64-bit.
MAX_IMAGE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """Kernel size, stride, padding and dilation of a Conv2d, each (height, width); padding is zeros on both sides."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise KernelError(f"convolution: got {self}, wanted sizes of 1 or more and padding of 0 or more")

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        out_h, out_w = ((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sizes)
        if min(out_h, out_w) < 1:
            raise KernelError(f"convolution: got an image of {height} x {width}, wanted one that {self} fits in")
        return out_h, out_w

    def to_ints(self) -> list[int]:
        """Return the fields as integers, for a registered operator."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> ConvGeometry:
        """Read what `to_ints` wrote."""
        kh, kw, sh, sw, ph, pw, dh, dw = values
        return cls((kh, kw), (sh, sw), (ph, pw), (dh, dw))


def conv2d_int(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    geometry: ConvGeometry,
    epilogue: Epilogue,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> Tensor:
    """Convolve quantized activations with a packed weight, in integers.

    Parameters
    ----------
    x : QuantizedActivation
        Codes of shape (B, H, W, C), dtype int8; one scale and zero point, or one for each sample.
    weights : sequence of PackedWeight
        Taps in the order of rows, then columns. One record, or several that divide the output channels.
    geometry : ConvGeometry
    epilogue : Epilogue
        `residual` and `low_rank.hidden` have the output's leading dimensions (B, OH, OW).
    backend : KernelBackend
        AUTO takes Triton on a GPU, else the reference.

    Returns
    -------
    Tensor, shape (B, OH, OW, N), dtype `epilogue.dtype`
        Contiguous: a channels-last image once permuted.

    Raises
    ------
    KernelError
        If shapes disagree.
    """
    if x.codes.dim() != 4 or len(x.scale) not in (1, x.codes.shape[0]):
        raise KernelError(
            f"conv2d: got codes {tuple(x.codes.shape)} with {len(x.scale)} scales, wanted (B, H, W, C) with 1 or B"
        )
    batch, height, width, channels = x.codes.shape
    if x.codes[0:1].numel() > MAX_IMAGE:
        raise KernelError(f"conv2d: got an image of {x.codes[0:1].numel()} codes, wanted at most {MAX_IMAGE}")
    n = check_weights(weights, taps=geometry.taps, channels=channels)
    shape = (batch, *geometry.output_size(height, width), n)
    epilogue.check(shape)
    rows = epilogue_rows(epilogue)
    span = sum((size - 1) * stride for size, stride in zip(x.codes.shape[1:], x.codes.stride()[1:], strict=True))
    codes = x.codes if x.codes.stride(-1) == 1 and span <= MAX_IMAGE else x.codes.contiguous()
    if not is_traced(x.codes):
        image = QuantizedActivation(codes, x.scale.contiguous(), x.zero_point.contiguous(), x.symmetric)
        return _convolve(image, weights, geometry, rows, n, epilogue.dtype, str(backend))
    return _conv2d_int(
        codes,
        x.scale.contiguous(),
        x.zero_point.contiguous(),
        x.symmetric,
        *flatten_weights(weights),
        geometry.to_ints(),
        rows.bias,
        rows.residual,
        rows.down,
        rows.up,
        n,
        epilogue.dtype,
        str(backend),
    )


def conv2d_int_reference(
    x: QuantizedActivation, weights: Sequence[PackedWeight], geometry: ConvGeometry, rows: EpilogueRows, n: int
) -> Tensor:
    """Plain-torch twin of the Triton kernel: float32 (B, OH, OW, N)."""
    batch, height, width, _ = x.codes.shape
    runs = x.zero_point.view(-1, 1, 1, 1)
    # Sums below 2**53 are exact in float64, in any order.
    image = (x.codes.int() - runs).permute(0, 3, 1, 2).double()
    out_h, out_w = geometry.output_size(height, width)
    out = torch.empty(batch, out_h, out_w, n, dtype=torch.float32, device=x.codes.device)
    patches = F.unfold(image, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)
    patches = patches.view(batch, -1, geometry.taps, out_h * out_w)  # (B, C, taps, positions)
    for weight in weights:
        values = weight_integers(weight).double()  # (rows, taps, C)
        total = torch.zeros(batch, out_h * out_w, weight.rows, device=x.codes.device)
        layout = weight.layout
        if not layout.has_group_scales:
            integers = torch.einsum("bctp,ntc->bpn", patches, values)
            total += integers.float() * weight.scale[:, 0].float()
        else:
            for group in range(layout.groups):
                tap, start = group // layout.groups_per_tap, group % layout.groups_per_tap * layout.group_size
                part = slice(start, start + layout.group_size)
                integers = torch.einsum("bcp,nc->bpn", patches[:, part, tap], values[:, tap, part])
                total += integers.float() * weight.scale[:, group].float()
        channel = slice(None) if weight.channel is None else weight.channel.long()
        out[..., channel] = (total * x.scale.view(-1, 1, 1)).view(batch, out_h, out_w, -1)
    return add_epilogue(out.view(-1, n), rows, torch.float32).view(out.shape)


def _convolve(
    x: QuantizedActivation,
    weights: Sequence[PackedWeight],
    geometry: ConvGeometry,
    rows: EpilogueRows,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Convolve (B, H, W, C) on the backend that is asked for."""
    if backend_for(x.codes.device, backend) is KernelBackend.TRITON:
        from kernels._triton.conv import launch_conv2d_int

        with torch.cuda.device_of(x.codes):
            return launch_conv2d_int(x, weights, geometry, rows, n, dtype)
    return conv2d_int_reference(x, weights, geometry, rows, n).to(dtype)


@torch.library.custom_op("quantmill::conv2d_int", mutates_args=())
def _conv2d_int(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    x_symmetric: bool,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    geometry: Sequence[int],
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
    return _convolve(x, weights, ConvGeometry.from_ints(geometry), rows, n, dtype, backend)


@_conv2d_int.register_fake
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    x_symmetric: bool,
    weight_tensors: Sequence[Tensor],
    weight_ints: Sequence[int],
    geometry: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    n: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    batch, height, width, _ = codes.shape
    return codes.new_empty(batch, *ConvGeometry.from_ints(geometry).output_size(height, width), n, dtype=dtype)
