"""A layer's weight as oneDNN's int8 operators take it: int8 rows, one float scale each, exactly the artifact's numbers.

    one digit   The int8 weight is code - zero point: up to 7 bits always fit, 8 bits where the zero point is 128. Where
                groups have multipliers, it is (code - zero point) * multiplier, which always fits.
                Asymmetric 8-bit weights are stored as code - 128, and the input's sums correct for the rest:
                    sum (x - x_zero) (w - zero) = sum (x - x_zero) (w - 128) - (zero - 128) * sum (x - x_zero).
    digits      A float scale of a group is a whole number (below 256 in bfloat16) times a power of two. So the weights
                of one output channel, (code - zero) * scale, are whole numbers of one common step, a power of two:
                    w = step * (d0 + 256 d1 + 65536 d2),   d in [-128, 127].
                Each digit is an output channel of its own; their sums, each an exact integer, are added in float32.
    saturation  Without VNNI or AMX, oneDNN adds pairs of products in int16 (vpmaddubsw), which saturates above 32767:
                exact only if 2 * 255 * max|w| fits. `pack_cpu_weight` measures this machine. What does not fit is left
                to the product of our own (`kernels.native`), which AVX2 is enough for, and refused without it.

Weights are unpacked once: a byte a weight and digit. oneDNN's order of a convolution's weights depends on the size of
the image, so it is chosen at the first call. Weights in another order would be rearranged at every call, which takes up
to a hundred times as long as the convolution.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import native
from kernels.backend import BackendUnavailableError
from kernels.conv import ConvGeometry
from kernels.errors import KernelError
from kernels.gemm import check_weights
from kernels.native import ProductWeight
from kernels.weights import PackedWeight, expand_weight_groups, row_chunks, weight_integers

# The largest |w| with which a pair of products can't saturate int16.
PAIR_LIMIT = (2**15 - 1) // (2 * 255)
DIGIT_LIMIT = 3
# The most weights of a `SmallMatrix`.
SMALL_MATRIX = 1 << 16
# The most weights that are kept a second time, for calls of few positions.
SMALL_PRODUCT = 1 << 19
# Products of codes and weights up to which `native.product` is faster than oneDNN with what surrounds it.
SMALL_WORK = 1 << 26
# What `CpuWeight.small_work` is where there is nothing else.
ANY_WORK = 1 << 62
_DIGIT = 256
# The largest number that DIGIT_LIMIT digits of [-128, 127] hold on both sides of 0.
_LARGEST = 127 * (_DIGIT**DIGIT_LIMIT - 1) // (_DIGIT - 1)


class ConvLayout:
    """int8 weights (N, C, kh, kw) in the order that oneDNN wants for one size of (padded) images.

    Attributes
    ----------
    packed : Tensor
        Opaque.
    unpadded : ConvGeometry
        As the images come.
    zeros : Tensor, shape (N,), dtype int32
        Zero points, of which there are none.
    """

    __slots__ = ("_shape", "packed", "unpadded", "zeros")

    def __init__(self, weight: Tensor, geometry: ConvGeometry, shape: Sequence[int] | None = None) -> None:
        self.unpadded = replace(geometry, padding=(0, 0))
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self._shape = None if shape is None else tuple(shape)
        self.packed = self._order(weight)

    def __deepcopy__(self, memo: dict[int, object]) -> ConvLayout:
        """Share the weights, which nothing writes to, until images of another size come."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin

    def for_images(self, shape: Sequence[int]) -> Tensor:
        """Return the weights for images of `shape` (B, C, H, W), padded; while compiling, as they are."""
        if not torch.compiler.is_compiling() and tuple(shape) != self._shape:
            self._shape = tuple(shape)
            self.packed = self._order(self.packed.to_dense())
        return self.packed

    def _order(self, weight: Tensor) -> Tensor:
        g, shape = self.unpadded, None if self._shape is None else list(self._shape)
        sizes = (list(g.stride), list(g.padding), list(g.dilation), 1)
        return torch.ops.onednn.qconv_prepack(weight, torch.ones(len(weight)), 1.0, 0, *sizes, shape)


@dataclass(frozen=True, slots=True)
class SmallMatrix:
    """int8 weights (channels, digits * N) of a Linear, as they are.

    oneDNN's quantized Linear takes 16 us before it multiplies, `torch._int_mm` 2 us, and multiplies as fast; but it
    leaves integers, which a pass of their own scales.
    """

    values: Tensor


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """A layer's weight as oneDNN lays it out.

    Attributes
    ----------
    packed : Tensor, SmallMatrix, ConvLayout or None
        int8; digits * N output channels, all of digit 0 first. A Tensor is in oneDNN's order. None: `small` is all.
    scale : Tensor, shape (digits * N,), dtype float32
    sums : Tensor, shape (digits * N,), dtype int32
        Of each output's int8 weights: what each step of an input's zero point takes away.
    zero_term : Tensor, shape (digits * N,), dtype float32
        scale * sums.
    correction : Tensor, shape (N,), dtype float32, or None
        scale * (zero_point - 128), for asymmetric 8-bit weights.
    outputs : int
        N, the layer's output channels.
    digits : int
        1 to 3.
    channels : int
        Input channels.
    geometry : ConvGeometry or None
        None for a Linear.
    small : ProductWeight or None
        The same weights for `native.product`: for calls of few positions, if they are few themselves; of one digit.
    small_work : int
        Products of codes and weights up to which `small` is taken.
    """

    packed: Tensor | SmallMatrix | ConvLayout | None
    scale: Tensor
    sums: Tensor
    zero_term: Tensor
    correction: Tensor | None
    outputs: int
    digits: int
    channels: int
    geometry: ConvGeometry | None
    small: ProductWeight | None = None
    small_work: int = SMALL_WORK

    @property
    def nbytes(self) -> int:
        """Bytes of the int8 weights and what is kept for each of their rows; oneDNN may pad rows besides."""
        taps = 1 if self.geometry is None else self.geometry.taps
        rows = (self.scale, self.sums, self.zero_term)
        copies = (self.packed is not None) + (self.small is not None)
        stored = copies * self.scale.numel() * self.channels * taps
        return stored + sum(each.numel() * each.element_size() for each in rows)

    def __deepcopy__(self, memo: dict[int, object]) -> CpuWeight:
        """Share the tensors: nothing writes to them, and oneDNN's can't be copied."""
        return replace(
            self, packed=copy.deepcopy(self.packed, memo) if isinstance(self.packed, ConvLayout) else self.packed
        )


def pack_cpu_weight(weights: Sequence[PackedWeight], geometry: ConvGeometry | None = None) -> CpuWeight:
    """Unpack a layer's weight to int8 and have oneDNN lay it out.

    Parameters
    ----------
    weights : sequence of PackedWeight
        One that holds all output channels, or several that divide them; on the CPU.
    geometry : ConvGeometry, optional
        Of a Conv2d; without it, the layer is a Linear.

    Raises
    ------
    BackendUnavailableError
        If this machine's int8 products saturate and the weight is large enough for that, or PyTorch has no oneDNN.
    KernelError
        If the parts do not fit together, or a channel's scales are too far apart for 3 digits.
    """
    if not torch.backends.mkldnn.is_available():
        raise BackendUnavailableError("backend: got 'cpu', but this PyTorch has no oneDNN; wanted reference")
    channels, taps = weights[0].layout.channels, 1 if geometry is None else geometry.taps
    n = check_weights(weights, taps=taps, channels=channels)
    matrix, sums = torch.empty(1, n, taps, channels, dtype=torch.int8), torch.zeros(1, n, dtype=torch.int64)
    scale = torch.empty(n, dtype=torch.float32)
    zero = torch.zeros(n, dtype=torch.float32)
    for rows, chunk in _chunks(weights):
        integers, scale[rows], zero[rows] = _whole_rows(chunk)
        digits = _int8_digits(integers)
        if len(digits) > len(matrix):  # rows before these have zeros there
            more = (len(digits) - len(matrix), n)
            matrix = torch.cat([matrix, torch.zeros(*more, taps, channels, dtype=torch.int8)])
            sums = torch.cat([sums, torch.zeros(more, dtype=torch.int64)])
        for place, digit in enumerate(digits):
            matrix[place, rows], sums[place, rows] = digit, digit.sum((1, 2), dtype=torch.int64)
    count, exact = len(matrix), _adds_up(matrix)
    small = None
    if count == 1 and channels % native.QUAD == 0 and native.product_level():
        small = native.pack_product(matrix[0], scale, zero) if matrix.numel() <= SMALL_PRODUCT or not exact else None
    if small is None:
        _check_saturation(matrix)
    matrix, sums = matrix.flatten(0, 1), sums.flatten()
    row_scale = torch.cat([scale * float(_DIGIT**power) for power in range(count)])
    zero_term = (sums.double() * row_scale.double()).float()
    correction = scale * zero if bool(zero.any()) else None
    packed: Tensor | SmallMatrix | ConvLayout | None = None
    if not exact:
        return CpuWeight(
            None, row_scale, sums.int(), zero_term, correction, n, count, channels, geometry, small, ANY_WORK
        )
    if geometry is None and matrix.numel() <= SMALL_MATRIX:
        packed = SmallMatrix(matrix[:, 0].t().contiguous())
    elif geometry is None:
        packed = torch.ops.onednn.qlinear_prepack(matrix[:, 0], None)
    else:
        image = matrix.view(len(matrix), *geometry.kernel, channels).permute(0, 3, 1, 2).contiguous()
        packed = ConvLayout(image, geometry)
    return CpuWeight(packed, row_scale, sums.int(), zero_term, correction, n, count, channels, geometry, small)


@functools.cache
def sums_pairs_exactly() -> bool:
    """Whether this machine's int8 products are summed without saturation. Measured: oneDNN may be told to use less."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    image = torch.full((1, 64, 1, 1), 255, dtype=torch.uint8)
    layout = ConvLayout(weight.view(16, 64, 1, 1), ConvGeometry((1, 1)), image.shape)
    sizes = (layout.unpadded.stride, layout.unpadded.padding, layout.unpadded.dilation, 1)
    ones = torch.ones(16)
    convolved = torch.ops.onednn.qconv_pointwise.tensor(
        image, ones[:1], layout.zeros[:1], layout.packed, ones, layout.zeros, None, *sizes, 1.0, 0, torch.float32,
        "none", [], "",
    )  # fmt: skip
    product = torch._int_mm(weight, weight.t())
    return bool((convolved == 255 * 127 * 64).all()) and bool((product == 127 * 127 * 64).all())


def _chunks(weights: Sequence[PackedWeight]) -> Iterator[tuple[Tensor, PackedWeight]]:
    """Yield some rows of a layer at a time: their output channels, int64, and their weight."""
    for weight in weights:
        outputs = torch.arange(weight.rows) if weight.channel is None else weight.channel.long()
        for rows in row_chunks(weight.rows, weight.layout.taps * weight.layout.channels):
            yield outputs[rows], weight.some(rows)


def _whole_rows(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (rows, taps, C), int32, their scale (rows,), and the zero point that is still in them (rows,)."""
    integers = weight_integers(weight)
    zero = torch.zeros(weight.rows, dtype=torch.int32)
    if weight.layout.has_group_scales:
        factor, step = _whole_scales(weight.scale.float())
        if int(integers.abs().max()) * int(factor.max()) > _LARGEST:
            raise KernelError(
                f"scale: got groups of one output channel up to {int(factor.max())} steps apart, wanted weights that "
                f"{DIGIT_LIMIT} int8 digits hold"
            )
        return integers * expand_weight_groups(factor.int(), weight.layout), step, zero.float()
    if integers.numel() and (int(integers.min()) < -128 or int(integers.max()) > 127):
        zero = weight.zero_point[:, 0].int()
        integers = integers + zero[:, None, None]
    return integers, weight.scale[:, 0].float(), zero.float()


def _whole_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Write scales (N, G) as whole multiples, int64 (N, G), of one power of two per row, float32 (N,)."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1) of 24 bits
    whole = (mantissa.double() * 2**24).long()
    trailing = torch.frexp((whole & -whole).float())[1] - 1  # zero bits at the end
    least = (exponent + trailing).amin(dim=1, keepdim=True)
    shift = exponent + trailing - least
    # Beyond 31 bits the caller refuses anyway.
    return (whole >> trailing) << shift.clamp(max=31), torch.ldexp(torch.ones(len(scale)), least[:, 0] - 24)


def _int8_digits(integers: Tensor) -> list[Tensor]:
    """Return the digits of int32 values to the base 256, least first, each in [-128, 127], dtype int8."""
    digits = []
    while integers.numel() and (int(integers.min()) < -128 or int(integers.max()) > 127):
        low = ((integers + 128) & (_DIGIT - 1)) - 128
        digits.append(low.to(torch.int8))
        integers = (integers - low) >> 8
    return [*digits, integers.to(torch.int8)]


def _largest_of(matrix: Tensor) -> int:
    return max(-int(matrix.min()), int(matrix.max())) if matrix.numel() else 0


def _adds_up(matrix: Tensor) -> bool:
    """Whether oneDNN's products of these int8 weights do not saturate on this machine."""
    return _largest_of(matrix) <= PAIR_LIMIT or sums_pairs_exactly()


def _check_saturation(matrix: Tensor) -> None:
    """Refuse int8 weights whose products would saturate on this machine."""
    largest = _largest_of(matrix)
    if not _adds_up(matrix):
        raise BackendUnavailableError(
            f"backend: got 'cpu' for weights up to {largest} on a CPU without VNNI or AMX, whose int8 products "
            f"saturate; wanted weights up to {PAIR_LIMIT}, or reference"
        )
