from __future__ import annotations

import pytest
import torch

from kernels.activations import QuantizedActivation
from kernels.epilogue import Epilogue
from kernels.errors import KernelError
from kernels.gemm import EPILOGUE_TOLERANCE, linear_int
from kernels.packing import pack_codes
from kernels.weights import MAX_COLUMNS, join_widths, pack_weight, unpack_weight, weight_integers
from tests.kernels.example_layers import mixed_layer, random_layer, weight_values


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize(("channels", "taps"), [(1, 1), (63, 1), (256, 1), (100, 9)])
def test_packed_weights_stand_for_the_artifacts_integers(
    bits: int, group_size: int | None, channels: int, taps: int
) -> None:
    layer = random_layer(5, channels, bits=bits, group_size=group_size, taps=taps)
    want = layer.integers(channels, group_size)
    assert torch.equal(weight_integers(layer.packed).flatten(1), want.int())
    assert weight_integers(layer.packed).dtype == torch.int32
    per_tap = 1 if group_size is None else -(-channels // group_size)
    k = torch.arange(taps * channels)
    group = torch.zeros_like(k) if group_size is None else k // channels * per_tap + k % channels // group_size
    assert torch.equal(weight_values(layer.packed).flatten(1), want.float() * layer.scale.float()[:, group])
    if group_size is None:
        totals = want.view(5, taps, channels).sum(-1)
    else:
        totals = torch.stack([want[:, group == g].sum(1) for g in range(taps * per_tap)], dim=1)
    assert torch.equal(layer.packed.total.long(), totals)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize(("channels", "taps"), [(24, 1), (256, 1), (100, 9)])
def test_multiplied_groups_are_integers_of_8_bits(bits: int, group_size: int, channels: int, taps: int) -> None:
    layer = random_layer(5, channels, bits=bits, group_size=group_size, taps=taps, multiplied=True)
    want = layer.integers(channels, group_size).int()
    (fast,) = unpack_weight([layer.packed])
    values = want.float() * layer.scale
    for packed in (layer.packed, fast):
        assert packed.scale.shape == (5, 1)
        assert torch.equal(weight_values(packed).flatten(1), values)
        if not torch.equal(packed.scale, layer.scale):  # one group, whose multiplier is in the scale
            assert packed.layout.groups == 1
            continue
        assert torch.equal(weight_integers(packed).flatten(1), want)
        assert torch.equal(packed.total, want.view(5, taps, channels).sum(-1).int())
    assert (fast.layout.bits, fast.layout.groups, fast.whole) == (8, 1, None)
    assert bits != 4 or channels < 100 or int(fast.codes.min()) < -100, "the largest multipliers fill an int8"


def test_multipliers_that_do_not_fit_are_refused() -> None:
    codes, scale = torch.zeros(1, 32, dtype=torch.uint8), torch.ones(1, 1)

    def pack(zero: int, multiplier: int, bits: int = 4) -> None:
        zeros, factors = (torch.full((1, 2), value, dtype=torch.int32) for value in (zero, multiplier))
        row = codes if bits == 4 else torch.zeros(1, 64, dtype=torch.uint8)
        pack_weight(row, scale, zeros, bits=bits, channels=64, group_size=32, multiplier=factors)

    pack(8, 16)  # -128 to 112
    pack(15, 8)  # -120 to 0
    with pytest.raises(
        KernelError, match=r"multiplier: got one up to 9, wanted \(code - zero_point\) \* multiplier in"
    ):
        pack(15, 9)
    with pytest.raises(KernelError, match="multiplier: got one up to 9"):
        pack(0, 9)
    with pytest.raises(KernelError, match="multiplier: got 0, wanted 1 or more"):
        pack(8, 0)
    with pytest.raises(KernelError, match="multiplier: got one with codes of 8 bits, wanted 6"):
        pack(128, 1, bits=8)


def test_the_layout_of_a_block_of_4_bits() -> None:
    # 64 channels are one block of 32 bytes: byte j holds channel j below and channel 32 + j above.
    codes = torch.arange(64, dtype=torch.uint8)[None] % 16
    codes[0, 32:] = 15 - codes[0, 32:]
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
    packed = pack_weight(pack_codes(codes, 4), one, zero, bits=4, channels=64)
    assert packed.layout.lane == 32
    assert packed.codes.tolist() == [[int(codes[0, j]) | int(codes[0, 32 + j]) << 4 for j in range(32)]]


@pytest.mark.parametrize(
    ("bits", "channels", "group_size", "lane"),
    [(4, 640, None, 64), (4, 640, 128, 64), (4, 640, 64, 64), (4, 640, 32, 32), (4, 320, None, 32), (2, 512, None, 64)],
)
def test_lanes_are_long_where_nothing_is_padded(bits: int, channels: int, group_size: int | None, lane: int) -> None:
    packed = random_layer(2, channels, bits=bits, group_size=group_size).packed
    assert packed.layout.lane == lane
    assert packed.codes.shape[1] * 8 == channels * bits


def test_four_bit_weights_stay_near_their_packed_size() -> None:
    packed = random_layer(256, 640, bits=4, group_size=64).packed
    artifact = 256 * (640 // 2 + 10 * (2 + 1))  # codes, bfloat16 scales, zero points
    assert packed.nbytes <= 1.1 * artifact
    multiplied = random_layer(256, 640, bits=4, group_size=64, multiplied=True).packed
    assert multiplied.nbytes < packed.nbytes


def test_layers_that_kernels_cannot_multiply_exactly_are_refused() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8)
    row = torch.zeros(1, 64, dtype=torch.uint8)
    with pytest.raises(KernelError, match="group_size: got 16, wanted a multiple of 32"):
        pack_weight(row, one, zero, bits=8, channels=64, group_size=16)
    with pytest.raises(KernelError, match=r"scale: got shape \(1, 2\), wanted \(1, 1\)"):
        pack_weight(row, torch.ones(1, 2), zero, bits=8, channels=64)
    with pytest.raises(KernelError, match="zero_point: got 16 to 16, wanted codes of 4 bits"):
        pack_weight(row[:, :32], one, zero + 16, bits=4, channels=64)
    with pytest.raises(KernelError, match=r"channel: got shape \(2,\), wanted \(1,\)"):
        pack_weight(row, one, zero, bits=8, channels=64, channel=torch.zeros(2))
    with pytest.raises(KernelError, match="bits: got 7"):
        pack_weight(row, one, zero, bits=7, channels=64)
    with pytest.raises(KernelError, match=r"got shape \(1, 64\), wanted \(N, 48\): 1 taps of 48 channels"):
        pack_weight(row, one, zero, bits=8, channels=48)
    with pytest.raises(KernelError, match=f"wanted at most {MAX_COLUMNS} for an exact int32 sum"):
        pack_weight(torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.uint8), one, zero, bits=8, channels=MAX_COLUMNS + 1)


@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (4, 64), (2, 96), (3, None), (6, None)])
def test_unpacked_codes_multiply_to_the_same(bits: int, group_size: int | None) -> None:
    layer = random_layer(37, 200, bits=bits, group_size=group_size, taps=9)
    (fast,) = unpack_weight([layer.packed])
    assert (fast.layout.bits, fast.layout.symmetric, fast.codes.dtype) == (8, True, torch.int8)
    assert torch.equal(weight_integers(fast), weight_integers(layer.packed))
    assert torch.equal(weight_values(fast), weight_values(layer.packed))
    assert torch.equal(fast.total.int(), layer.packed.total.int())
    if group_size is not None:
        assert fast.whole is not None
        assert torch.allclose(fast.whole, weight_values(layer.packed).sum(-1), rtol=1e-5, atol=1e-3)


def test_channels_of_several_bits_become_one_matrix() -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    shares = zip((3, 4, 5), order.split(10), strict=True)
    parts = [random_layer(10, 70, bits=bits, channel=channel).packed for bits, channel in shares]
    (fast,) = unpack_weight(parts)
    for part in parts:
        assert part.channel is not None
        assert torch.equal(weight_integers(fast)[part.channel.long()], weight_integers(part))
        assert torch.equal(fast.scale[part.channel.long()], part.scale)
    assert fast.channel is None


def test_channels_of_several_bits_with_scales_of_groups_become_one_matrix() -> None:
    parts = mixed_layer(64, (3, 4), group_size=32)
    (fast,) = unpack_weight(parts)
    for part in parts:
        assert part.channel is not None
        assert torch.equal(weight_values(fast)[part.channel.long()], weight_values(part))


def test_what_does_not_fit_in_int8_stays_packed() -> None:
    eight = random_layer(8, 64, bits=8).packed  # code - zero_point of up to 255
    assert unpack_weight([eight])[0] is eight
    (three,), (four,) = mixed_layer(64, (3,), group_size=32), mixed_layer(64, (4,))
    assert unpack_weight([three, four]) == (three, four)


@pytest.mark.parametrize("multiplied", [False, True])
def test_widths_that_are_stored_alike_are_one_record(multiplied: bool) -> None:
    bits = (1, 2, 3, 4, 5, 6) if multiplied else (1, 2, 3, 4, 5, 6, 8)
    parts = mixed_layer(70, bits, group_size=32 if multiplied else None, multiplied=multiplied)
    joined = join_widths(parts)
    assert [weight.layout.bits for weight in joined] == [2, 4, 8]
    assert sum(weight.rows for weight in joined) == 10 * len(bits)
    for part in parts:
        (one,) = [weight for weight in joined if weight.layout.bits == part.layout.bits]
        assert part.channel is not None
        assert one.channel is not None
        rows = [one.channel.tolist().index(channel) for channel in part.channel.tolist()]
        assert torch.equal(weight_values(one)[rows], weight_values(part))
        assert torch.equal(one.total.int()[rows], part.total.int())


def test_five_and_six_bits_need_no_correction_by_sums_of_inputs() -> None:
    for bits in (5, 6):
        layer = random_layer(9, 40, bits=bits)
        assert layer.packed.layout.symmetric
        assert not layer.packed.zero_point.any()
        assert torch.equal(weight_integers(layer.packed).flatten(1), layer.integers(40, None).int())


def test_backends_multiply_unpacked_weights_alike(device: str) -> None:
    layer = random_layer(40, 160, bits=4, group_size=64)
    codes = torch.randint(-128, 128, (33, 160), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale, zero = (torch.tensor([value], device=device) for value in (0.1, 7))
    x = QuantizedActivation(codes.to(device), scale, zero.int(), symmetric=False)
    fast = [weight.to(device) for weight in unpack_weight([layer.packed])]
    want = linear_int(x, [layer.packed.to(device)], Epilogue(), "reference")
    for backend in ("reference", "triton"):
        got = linear_int(x, fast, Epilogue(), backend)
        assert (got - want).abs().max() <= EPILOGUE_TOLERANCE * want.abs().max()
