from __future__ import annotations

import pytest
import torch

from kernels.errors import KernelError
from kernels.packing import pack_codes
from kernels.weights import MAX_COLUMNS, pack_weight, weight_integers
from tests.kernels.example_layers import random_layer, weight_values


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
