"""Packed weights in the layout that the integer kernels read, made once from an artifact's layout.

An artifact holds the matrix (N, K) of a layer, K = taps x C in the order (taps, C), as one bit stream per row
(`kernels.packing`). A kernel reads blocks of it, so the rows are laid out again, still packed:

    lanes     a block of one tap's channels is `per_byte` = 8 / bits runs of `lane` channels; byte j of the block holds
              the channels j, j + lane, j + 2 lane, ... of the block, low bits first. A kernel loads `lane` bytes once
              and masks out each run in registers, so that both operands of each dot are contiguous.
    padding   channels of each tap are padded to whole blocks. Kernels read activations there as 0, so that the codes
              that fill them never count.
    bits      2, 4 or 8: codes of 1 bit are stored in 2, of 3 bits in 4, of 5 and 6 bits in 8.
    sign      8-bit codes are stored as code - 128 (int8 tensor cores), with their zero points; smaller ones unsigned.
    groups    scales of groups are floats of their own, or whole numbers that multiply code - zero point, within int8,
              beside one scale of the row: sums over all columns are then integers. Of 5 and 6 bits, which take a byte
              anyway, the products are stored, and code - zero point where all columns of a row share a scale.

A layer whose channels have different bit widths is several `PackedWeight`s, each of which names its output channels:
`join_widths` leaves one for each width that is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.errors import KernelError
from kernels.packing import packed_size, unpack_codes

# The least K of an int8 tensor-core instruction (mma.m16n8k32, wgmma k32): no dot may be shorter.
MIN_LANE = 32
# Weights that are unpacked at a time.
CHUNK = 1 << 19
_STORED_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
# |sum| of K products of two 8-bit differences is at most K * 255 * 255, which int32 has to hold.
MAX_COLUMNS = (2**31 - 1) // (255 * 255)


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How the bytes of a `PackedWeight` are to be read.

    `bits` are the stored ones; `group_size` counts channels of one tap, 0 if all columns of a row share a scale;
    `symmetric` says that all stored zero points of 8-bit codes are 0, so that no correction by them is needed;
    `multiplied` that groups have whole numbers in place of scales.
    """

    bits: int
    channels: int
    taps: int
    lane: int
    group_size: int
    symmetric: bool
    multiplied: bool = False

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def blocks(self) -> int:
        """Blocks of lanes that one tap's channels take."""
        return -(-self.channels // (self.lane * self.per_byte))

    @property
    def groups_per_tap(self) -> int:
        """Scale groups in one tap."""
        return -(-self.channels // self.group_size) if self.group_size else 1

    @property
    def groups(self) -> int:
        """Zero points of one output channel."""
        return self.taps * self.groups_per_tap if self.group_size else 1

    @property
    def has_group_scales(self) -> bool:
        """Whether groups have scales of their own, so that no sum over all columns is an integer."""
        return self.group_size > 0 and not self.multiplied

    @property
    def scales(self) -> int:
        """Scales of one output channel."""
        return self.groups if self.has_group_scales else 1

    def to_ints(self) -> list[int]:
        """Return the fields as integers, for a registered operator."""
        flags = (int(self.symmetric), int(self.multiplied))
        return [self.bits, self.channels, self.taps, self.lane, self.group_size, *flags]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> WeightLayout:
        """Read what `to_ints` wrote."""
        bits, channels, taps, lane, group_size, symmetric, multiplied = values
        return cls(bits, channels, taps, lane, group_size, bool(symmetric), bool(multiplied))


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Weight codes of some output channels of one layer.

    Attributes
    ----------
    codes : Tensor, shape (N, taps * blocks * lane), dtype uint8 (int8 for 8 bits)
    scale : Tensor, shape (N, G), dtype float32 or bfloat16
        Step size, in weight units per integer step; G is 1 or the number of groups, taps major. (N, 1) where groups
        have multipliers.
    zero_point : Tensor, shape (N, G), dtype int8
        In the stored codes' domain; (N, 0) where groups have multipliers.
    total : Tensor, shape (N, taps * scales of a tap), dtype int16 or int32
        Sum of a row's integers (`weight_integers`) over each tap, of each group that has a scale: what an activation's
        zero point is multiplied with. By taps, since a tap that falls on padding has no part in it.
    channel : Tensor, shape (N,), dtype int32, or None
        The layer's output channel of each row; None if they are all of its channels, in order. Of all records of a
        layer they are each channel once, for which the caller answers: looking would make the host wait.
    layout : WeightLayout
    whole : Tensor, shape (N, taps), dtype float32, or None
        Sum of scale * (code - zero_point) over each tap, of an unpacked weight with groups (`unpack_weight`).
    factor : Tensor, shape (G, N), dtype int16, or None
        Where the layout is multiplied: what (code - zero point) is multiplied with, 1 to 16, in the low byte; in the
        high one 128 - multiplier * zero point, 0 to 128. So code * multiplier + high byte is an unsigned byte.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    total: Tensor
    channel: Tensor | None
    layout: WeightLayout
    whole: Tensor | None = None
    factor: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output channels in this record."""
        return self.codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.codes, self.scale, self.zero_point, self.total, self.channel, self.whole, self.factor)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the record on another device."""
        channel = None if self.channel is None else self.channel.to(device)
        codes, scale, zero, total = (t.to(device) for t in (self.codes, self.scale, self.zero_point, self.total))
        whole, factor = (None if t is None else t.to(device) for t in (self.whole, self.factor))
        return PackedWeight(codes, scale, zero, total, channel, self.layout, whole, factor)

    def some(self, rows: slice) -> PackedWeight:
        """Return some rows of the record, without their output channels."""
        codes, scale, zero, total = (t[rows] for t in (self.codes, self.scale, self.zero_point, self.total))
        factor = None if self.factor is None else self.factor[:, rows]
        return PackedWeight(codes, scale, zero, total, None, self.layout, None, factor)


def unpack_weight(weights: Sequence[PackedWeight]) -> tuple[PackedWeight, ...]:
    """Unpack a layer's codes to one int8 matrix of `weight_integers`, for kernels that multiply many rows.

    The integers and scales are the same, so results are; memory is a byte a weight, whatever its bits. Output channels
    of different bits become one matrix in their order, since each has its own scale anyway.

    Returns
    -------
    tuple of PackedWeight
        One record of 8 bits with zero points 0; or `weights` as they are, where integers do not fit in int8 (8-bit
        codes with other zero points), or where some records have scales of groups and others do not.
    """
    layout = weights[0].layout
    scales = {(weight.layout.has_group_scales, weight.layout.scales) for weight in weights}
    if len(scales) > 1 or not all(_fits_int8(weight) for weight in weights):
        return tuple(weights)
    padded = -(-layout.channels // MIN_LANE) * MIN_LANE
    rows = sum(weight.rows for weight in weights)
    device = weights[0].codes.device
    codes = torch.zeros(rows, layout.taps, padded, dtype=torch.int8, device=device)
    scale = torch.empty(rows, layout.scales, dtype=torch.float32, device=device)
    total = torch.empty(rows, weights[0].total.shape[1], dtype=torch.int32, device=device)
    for weight in weights:
        place = torch.arange(rows, device=device) if weight.channel is None else weight.channel.long()
        for some in _chunks_of(weight):
            codes[place[some], :, : layout.channels] = weight_integers(weight.some(some)).to(torch.int8)
        scale[place], total[place] = weight.scale.float(), weight.total.int()
    whole = None
    if layout.has_group_scales:
        per_tap = (layout.taps, layout.groups_per_tap)
        whole = (scale.double() * total.double()).view(rows, *per_tap).sum(-1).float()
        scale = scale.t().contiguous().t()  # read by group
    zero = torch.zeros(rows, layout.scales, dtype=torch.int8, device=device)
    group = layout.group_size if layout.has_group_scales else 0
    one = WeightLayout(8, layout.channels, layout.taps, MIN_LANE, group, symmetric=True)
    return (PackedWeight(codes.flatten(1), scale, zero, total, None, one, whole),)


def join_widths(weights: Sequence[PackedWeight]) -> tuple[PackedWeight, ...]:
    """Put the records of a layer together that are stored in the same width: those of 3 and 4 bits, of 5, 6 and 8.

    Parameters
    ----------
    weights : sequence of PackedWeight
        One that holds all output channels, or several that name theirs.

    Returns
    -------
    tuple of PackedWeight
        One for each stored width, narrowest first, with at most one layout each; several of a width only where their
        scales of groups differ in number.
    """
    if len(weights) == 1:
        return tuple(weights)
    alike: dict[tuple[object, ...], list[PackedWeight]] = {}
    for weight in weights:
        layout = replace(weight.layout, symmetric=False)
        key = (layout.bits, *layout.to_ints()[1:], weight.scale.dtype, weight.total.dtype)
        alike.setdefault(key, []).append(weight)
    return tuple(_concatenated(alike[key]) for key in sorted(alike, key=lambda key: (key[0], str(key))))


def _concatenated(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Put records of one layout under each other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    layout = replace(first.layout, symmetric=all(weight.layout.symmetric for weight in weights))
    channel, factor = (
        None if getattr(first, name) is None else torch.cat([getattr(weight, name) for weight in weights], dim)
        for name, dim in (("channel", 0), ("factor", 1))
    )
    codes, scale, zero, total = (
        torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scale", "zero_point", "total")
    )
    return PackedWeight(codes, scale, zero, total, channel, layout, None, factor)


def _fits_int8(weight: PackedWeight) -> bool:
    """Whether every code - zero_point is an int8: always, but for 8-bit codes with zero points; looks at those."""
    if weight.layout.bits < 8 or weight.layout.symmetric or weight.codes.numel() == 0:
        return True
    return all(bool(weight_integers(weight.some(rows)).abs().max() <= 127) for rows in _chunks_of(weight))


def _chunks_of(weight: PackedWeight) -> list[slice]:
    return row_chunks(weight.rows, weight.codes.shape[1])


def pack_weight(
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    channels: int,
    taps: int = 1,
    group_size: int | None = None,
    channel: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> PackedWeight:
    """Lay out an artifact's packed weight for the kernels.

    Parameters
    ----------
    qweight : Tensor, shape (N, ceil(K * bits / 8)), dtype uint8
        As `kernels.packing.pack_codes` of the matrix (N, K), K = taps * channels, taps major.
    scale, zero_point : Tensor, shape (N, G) or (1, G)
        G is 1, or taps * ceil(channels / group_size); the scale is (N, 1) where there are multipliers.
    bits : int
        Bits of a code in `qweight`: 1, 2, 3, 4, 5, 6 or 8.
    channels : int
        Input channels, which one tap of the kernel reads.
    taps : int
        Positions of a convolution's kernel; 1 for a Linear.
    group_size : int, optional
        Consecutive channels of a tap that share a scale; a multiple of 32, except the last of a tap, which may be
        shorter.
    channel : Tensor, shape (N,), optional
        Output channels of the rows, where they are not all of the layer's.
    multiplier : Tensor, shape (N, G), whole numbers from 1, optional
        What code - zero point is multiplied with, up to 6 bits; products of all codes must fit in an int8.

    Returns
    -------
    PackedWeight
        On the device of `qweight`.

    Raises
    ------
    KernelError
        If shapes disagree, a group is not a multiple of 32, K is too long for an exact int32 sum, or a multiplier too
        large for an int8.
    """
    n = qweight.shape[0]
    _check_rows(qweight, bits, channels, taps)
    if taps * channels > MAX_COLUMNS:
        raise KernelError(f"columns: got {taps * channels}, wanted at most {MAX_COLUMNS} for an exact int32 sum")
    if group_size is not None and (group_size < MIN_LANE or group_size % MIN_LANE):
        raise KernelError(f"group_size: got {group_size}, wanted a multiple of {MIN_LANE}")
    stored = _STORED_BITS[bits]
    group = group_size if group_size is not None and (group_size < channels or taps > 1) else 0
    zero = _rows_of("zero_point", zero_point, n, taps, channels, group).int()
    if zero.numel() and not 0 <= int(zero.min()) <= int(zero.max()) < 2**bits:
        raise KernelError(f"zero_point: got {int(zero.min())} to {int(zero.max())}, wanted codes of {bits} bits")
    if multiplier is not None:
        multiplier = _rows_of("multiplier", multiplier, n, taps, channels, group).int()
        _check_products(multiplier, zero, bits)
        scale = _rows_of("scale", scale, n, taps, channels, 0).float()
        if stored < 8 and not group:  # exact: such scales have bits to spare
            scale, multiplier = scale * multiplier, None
    if bits < stored == 8 and (multiplier is not None or not group):
        scale = _rows_of("scale", scale, n, taps, channels, 0).float()
        return _products(qweight, scale, zero, multiplier, bits, (channels, taps, group), channel)
    zero = zero - (128 if stored == 8 else 0)
    symmetric = stored == 8 and not bool(zero.any())
    lane = _lane(stored, channels, group)
    layout = WeightLayout(stored, channels, taps, lane, group, symmetric, multiplier is not None)
    scale = _rows_of("scale", scale, n, taps, channels, group if layout.has_group_scales else 0)
    if layout.scales == 1 or scale.dtype != torch.bfloat16:
        scale = scale.float()
    # Some rows at a time: unpacked, and summed in int32, they are several times as large.
    packed, totals = [], []
    for rows in row_chunks(n, taps * channels):
        codes = unpack_codes(qweight[rows], bits, taps * channels).view(-1, taps, channels)
        if stored == 8:
            codes = (codes ^ 0x80).view(torch.int8)  # code - 128
        packed.append(_interleave(codes, layout))
        totals.append(_totals(codes, zero[rows], layout, None if multiplier is None else multiplier[rows]))
    factor = None
    if multiplier is not None:
        factor = _factors(multiplier, zero)
        zero = zero[:, :0]
    zero_codes, index = zero.to(torch.int8).contiguous(), _index(channel, qweight)
    return PackedWeight(
        torch.cat(packed), scale.contiguous(), zero_codes, torch.cat(totals), index, layout, None, factor
    )


def _factors(multiplier: Tensor, zero: Tensor) -> Tensor:
    """Return `PackedWeight.factor` of multipliers and zero points (N, G), whose product is 128 at most."""
    return (multiplier | (128 - multiplier * zero) << 8).to(torch.int16).t().contiguous()


def _products(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor,
    multiplier: Tensor | None,
    bits: int,
    sizes: tuple[int, int, int],
    channel: Tensor | None,
) -> PackedWeight:
    """Store (code - zero point) * multiplier of codes that take a byte anyway; `sizes`: channels, taps, group."""
    channels, taps, group = sizes
    n = qweight.shape[0]
    grouped = WeightLayout(8, channels, taps, MIN_LANE, group, symmetric=True)
    layout = WeightLayout(8, channels, taps, MIN_LANE, 0, symmetric=True)
    packed, totals = [], []
    for rows in row_chunks(n, taps * channels):
        codes = unpack_codes(qweight[rows], bits, taps * channels).view(-1, taps, channels).int()
        codes = codes - expand_weight_groups(zero[rows], grouped)
        if multiplier is not None:
            codes = codes * expand_weight_groups(multiplier[rows], grouped)
        packed.append(_interleave(codes.to(torch.int8), layout))
        totals.append(codes.sum(-1, dtype=torch.int32))
    none = torch.zeros(n, 1, dtype=torch.int8, device=qweight.device)
    index = _index(channel, qweight)
    return PackedWeight(torch.cat(packed), scale.contiguous(), none, torch.cat(totals), index, layout)


def _check_products(multiplier: Tensor, zero: Tensor, bits: int) -> None:
    """Refuse multipliers with which (code - zero point) * multiplier of some code is no int8."""
    top = 2**bits - 1
    if bits == 8:
        raise KernelError("multiplier: got one with codes of 8 bits, wanted 6 bits at most")
    if multiplier.numel() and int(multiplier.min()) < 1:
        raise KernelError(f"multiplier: got {int(multiplier.min())}, wanted 1 or more")
    if bool(((zero * multiplier > 128) | ((top - zero) * multiplier > 127)).any()):
        raise KernelError(
            f"multiplier: got one up to {int(multiplier.max())}, wanted (code - zero_point) * multiplier in an int8"
        )


def _index(channel: Tensor | None, qweight: Tensor) -> Tensor | None:
    """Return the output channels of rows as kernels read them."""
    if channel is None:
        return None
    if channel.shape != (len(qweight),):
        raise KernelError(f"channel: got shape {tuple(channel.shape)}, wanted ({len(qweight)},)")
    return channel.to(qweight.device, torch.int32).contiguous()


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Return slices of rows (at least one, perhaps empty) of about CHUNK values each."""
    size = max(1, CHUNK // max(columns, 1))
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)] or [slice(0, 0)]


def weight_integers(weight: PackedWeight) -> Tensor:
    """Return code - zero_point of each column, times its multiplier, shape (N, taps, channels), dtype int32."""
    layout = weight.layout
    n = weight.rows
    stored = weight.codes.view(n, layout.taps, layout.blocks, 1, layout.lane)
    if layout.bits == 8:
        codes = stored.int()
    else:
        shifts = torch.arange(layout.per_byte, dtype=torch.int32, device=stored.device) * layout.bits
        codes = (stored.int() >> shifts[:, None]) & ((1 << layout.bits) - 1)
    codes = codes.reshape(n, layout.taps, -1)[..., : layout.channels]
    if weight.factor is None:
        return codes - expand_weight_groups(weight.zero_point.int(), layout)
    factor = weight.factor.t().int() & 0xFFFF
    products = codes * expand_weight_groups(factor & 255, layout)
    return products.add_(expand_weight_groups((factor >> 8) - 128, layout))


def expand_weight_groups(values: Tensor, layout: WeightLayout) -> Tensor:
    """Repeat (N, G) to what broadcasts against (N, taps, channels)."""
    if layout.groups == 1:
        return values[:, :, None]
    per_tap = values.view(len(values), layout.taps, layout.groups_per_tap)
    return per_tap.repeat_interleave(layout.group_size, dim=-1)[..., : layout.channels]


def _check_rows(qweight: Tensor, bits: int, channels: int, taps: int) -> None:
    """Refuse rows that do not hold `taps` taps of `channels` channels."""
    if bits not in _STORED_BITS:
        raise KernelError(f"bits: got {bits}, wanted one of {', '.join(map(str, _STORED_BITS))}")
    wanted = packed_size(taps * channels, bits)
    if qweight.dim() != 2 or min(channels, taps) < 1 or qweight.shape[1] != wanted:
        raise KernelError(
            f"qweight: got shape {tuple(qweight.shape)}, wanted (N, {wanted}): {taps} taps of {channels} channels"
        )


def _rows_of(name: str, values: Tensor, n: int, taps: int, channels: int, group: int) -> Tensor:
    """Give every row its parameters: (N, G), from (N, G) or (1, G)."""
    groups = taps * -(-channels // group) if group else 1
    if values.dim() != 2 or values.shape[0] not in (1, n) or values.shape[1] != groups:
        raise KernelError(f"{name}: got shape {tuple(values.shape)}, wanted ({n}, {groups})")
    return values.expand(n, groups)


def _lane(bits: int, channels: int, group: int) -> int:
    """Longest run that fits: 64 where that neither straddles a group nor pads more, else 32; 8 bits need none."""
    if bits == 8:
        return MIN_LANE
    block = 2 * MIN_LANE * (8 // bits)
    return 2 * MIN_LANE if channels % block == 0 and group % (2 * MIN_LANE) == 0 else MIN_LANE


def _interleave(codes: Tensor, layout: WeightLayout) -> Tensor:
    """Pad (N, taps, channels) to blocks and pack each into bytes."""
    n, taps, channels = codes.shape
    block = layout.lane * layout.per_byte
    padded = codes.new_zeros(n, taps, layout.blocks * block)
    padded[..., :channels] = codes
    if layout.bits == 8:
        return padded.flatten(1)
    runs = padded.view(n, taps, layout.blocks, layout.per_byte, layout.lane)
    packed = runs[..., 0, :].clone()
    for i in range(1, layout.per_byte):
        packed |= runs[..., i, :] << (i * layout.bits)
    return packed.flatten(1)


def _totals(codes: Tensor, zero: Tensor, layout: WeightLayout, multiplier: Tensor | None) -> Tensor:
    """Sum code - zero_point over each group, in int16 where all fit; times its multiplier, over each tap."""
    n, taps, channels = codes.shape
    group, groups = layout.group_size or channels, layout.groups_per_tap
    runs = torch.zeros(n, taps, groups * group, dtype=codes.dtype, device=codes.device)
    runs[..., :channels] = codes
    # One tap at a time: the sums' operands are four times as large as the codes.
    sums = [runs[:, tap].view(n, groups, group).sum(-1, dtype=torch.int32) for tap in range(taps)]
    counts = torch.full((groups,), group, dtype=torch.int32, device=codes.device)
    counts[-1] = channels - (groups - 1) * group
    totals = torch.cat(sums, dim=1) - zero * counts.repeat(taps)
    if multiplier is not None:
        return (totals * multiplier).view(n, taps, groups).sum(-1, dtype=torch.int32)
    most = group * ((1 << layout.bits) - 1)
    return totals.to(torch.int16 if layout.group_size and most < 2**15 else torch.int32)
