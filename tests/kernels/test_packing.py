from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.errors import KernelError
from kernels.packing import PACKED_BITS, pack_codes, packed_size, unpack_codes


def stream_bytes(codes: list[int], bits: int) -> list[int]:
    """The bit stream written out with Python integers, as the module's docstring defines it."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(stream.to_bytes((len(codes) * bits + 7) // 8, "little"))


def poisoned(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b1000_1101, 0b1]),
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (4, [0x1, 0xF, 0x8], [0xF1, 0x08]),
        (5, [31, 0, 31], [0b000_11111, 0b0_11111_00]),
        (6, [1, 2, 3, 63], [0b10_000001, 0b0011_0000, 0b111111_00]),
        (8, [0, 255, 128], [0, 255, 128]),
    ],
)
def test_pack_codes_writes_the_documented_bits(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected == stream_bytes(codes, bits)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_code_at_every_position_of_the_word(bits: int) -> None:
    codes = torch.zeros(16 << bits, 17, dtype=torch.uint8)
    rows = torch.arange(len(codes))
    codes[rows, rows % 17] = (rows // 16).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.tolist() == [stream_bytes(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits, 17), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("n", [*range(18), 63, 1000])
def test_round_trip_of_odd_sizes(bits: int, n: int) -> None:
    codes = poisoned((3, n), bits)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, packed_size(n, bits))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [stream_bytes(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits, n), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_extremes_fill_and_clear_every_bit(bits: int) -> None:
    top = torch.full((8,), (1 << bits) - 1, dtype=torch.uint8)
    assert pack_codes(top, bits).tolist() == [0xFF] * bits
    assert pack_codes(torch.zeros_like(top), bits).tolist() == [0] * bits


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_non_contiguous_and_misaligned_inputs(bits: int) -> None:
    base = poisoned((9, 41), bits)
    for codes in (base.t(), base[1:, 3:], base[:, ::3], base.flatten()[5:], base[None, :, :7]):
        packed = pack_codes(codes, bits)
        assert torch.equal(packed, pack_codes(codes.clone(memory_format=torch.contiguous_format), bits))
        strided = torch.full((*packed.shape, 3), 0x5A, dtype=torch.uint8)
        strided[..., 1] = packed
        assert torch.equal(unpack_codes(strided[..., 1], bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_inputs_are_left_alone(bits: int) -> None:
    codes = poisoned((4, 24), bits)
    kept = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.data_ptr() != codes.data_ptr()
    before = packed.clone()
    unpack_codes(packed, bits, 24)
    assert torch.equal(codes, kept)
    assert torch.equal(packed, before)


@given(
    bits=st.sampled_from(PACKED_BITS),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    n=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)
def test_round_trip_property(bits: int, shape: list[int], n: int, seed: int) -> None:
    codes = poisoned((*shape, n), bits, seed)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, n), codes)


@pytest.mark.parametrize("bits", [0, 7, 9, -4])
def test_unsupported_bits_are_refused(bits: int) -> None:
    with pytest.raises(KernelError, match=f"bits: got {bits}, wanted one of 1, 2, 3, 4, 5, 6, 8"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(KernelError, match=f"bits: got {bits}"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), bits, 4)


def test_bad_codes_are_refused() -> None:
    with pytest.raises(KernelError, match="codes: got a value of 16, wanted at most 15 for 4 bits"):
        pack_codes(torch.tensor([3, 16], dtype=torch.uint8), 4)
    with pytest.raises(KernelError, match=r"codes: got dtype torch.int8, wanted torch.uint8"):
        pack_codes(torch.zeros(4, dtype=torch.int8), 4)
    with pytest.raises(KernelError, match="codes: got a scalar"):
        pack_codes(torch.tensor(1, dtype=torch.uint8), 4)


def test_wrong_row_length_is_refused() -> None:
    with pytest.raises(KernelError, match="packed row of 5 codes of 4 bits: got 4 bytes, wanted 3"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 4, 5)
    with pytest.raises(KernelError, match="number of codes: got -1"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 4, -1)
