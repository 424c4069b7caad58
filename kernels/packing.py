"""Pack integer codes of 1, 2, 3, 4, 5, 6 or 8 bits into bytes, and back, exactly.

The layout is one little-endian bit stream per row of the last dimension: code i takes the bits [i*bits, (i+1)*bits) of
the stream, low bit first, and byte j holds the bits [8*j, 8*j+8). Every row starts on a byte. For 4 bits:

    byte        0                 1
    bit    7 6 5 4  3 2 1 0  7 6 5 4  3 2 1 0
    code   [ c1  ]  [ c0  ]  [ c3  ]  [ c2  ]

and for 3 bits, where codes straddle bytes and eight of them fill three:

    byte        0                 1                 2
    bit    7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code   c2- [c1 ] [c0 ]  -c5 [c4 ] [c3 ]-c2 [c7 ] [c6 ] c5-

The last byte of a row is filled with zero bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.errors import KernelError

PACKED_BITS = (1, 2, 3, 4, 5, 6, 8)

# Codes are moved eight at a time inside one int64, a byte each (or two in an int16 for 4 bits): shifts on whole words
# are vectorised by torch, strided byte writes are not. A view of words as bytes needs a little-endian machine.
_LANES = 8


def packed_size(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes of `bits` bits takes."""
    if bits not in PACKED_BITS:
        raise KernelError(f"bits: got {bits}, wanted one of {', '.join(map(str, PACKED_BITS))}")
    if n < 0:
        raise KernelError(f"number of codes: got {n}, wanted 0 or more")
    return (n * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into the bit stream of this module's docstring.

    Parameters
    ----------
    codes : Tensor, shape (..., n), dtype uint8
        Values in [0, 2**bits - 1]; any strides.
    bits : int
        1, 2, 3, 4, 5, 6 or 8.

    Returns
    -------
    Tensor, shape (..., ceil(n * bits / 8)), dtype uint8
        Contiguous. A new tensor, also for 8 bits.

    Raises
    ------
    KernelError
        If `bits` is not supported, or `codes` has another dtype, no dimension, or a value out of range.
    """
    _check_bytes("codes", codes)
    n = codes.shape[-1]
    size = packed_size(n, bits)
    if codes.numel() == 0:
        return codes.new_zeros(*codes.shape[:-1], size)
    if bits < 8 and int(codes.max()) >= 1 << bits:
        raise KernelError(f"codes: got a value of {int(codes.max())}, wanted at most {(1 << bits) - 1} for {bits} bits")
    if bits == 8:
        return codes.clone(memory_format=torch.contiguous_format)
    padded = codes.new_zeros(*codes.shape[:-1], -(-n // _LANES) * _LANES)
    padded[..., :n] = codes
    if bits == 4:
        pairs = padded.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)[..., :size].contiguous()
    lanes = padded.view(torch.int64)
    words = torch.zeros_like(lanes)
    for lane in range(_LANES):
        words |= ((lanes >> (8 * lane)) & 0xFF) << (bits * lane)
    used = words.unsqueeze(-1).view(torch.uint8)[..., :bits]  # (..., n / 8, bits): the low bytes of each word
    return used.flatten(-2)[..., :size].contiguous()


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Unpack the first `n` codes of each row; the inverse of `pack_codes`.

    Parameters
    ----------
    packed : Tensor, shape (..., ceil(n * bits / 8)), dtype uint8
        As `pack_codes` returns it; any strides.
    bits : int
        1, 2, 3, 4, 5, 6 or 8.
    n : int
        Codes in a row.

    Returns
    -------
    Tensor, shape (..., n), dtype uint8
        Contiguous. For 8 bits it may share memory with `packed`.

    Raises
    ------
    KernelError
        If `bits` is not supported, or `packed` has another dtype, no dimension, or another number of bytes in a row.
    """
    _check_bytes("packed codes", packed)
    size = packed_size(n, bits)
    if packed.shape[-1] != size:
        raise KernelError(f"packed row of {n} codes of {bits} bits: got {packed.shape[-1]} bytes, wanted {size}")
    if packed.numel() == 0:
        return packed.new_zeros(*packed.shape[:-1], n)
    if bits == 8:
        return packed.contiguous()
    if bits == 4:
        pairs = packed.contiguous().to(torch.int16)
        codes = ((pairs << 4) | pairs).bitwise_and_(0x0F0F).view(torch.uint8)
    elif bits == 2:
        quads = packed.contiguous().to(torch.int32)
        quads |= quads << 12  # bytes 0, 2: codes 0 1 and 2 3
        quads |= quads << 6
        codes = quads.bitwise_and_(0x03030303).view(torch.uint8)
    else:
        codes = _spread_words(packed, bits)
    return codes if codes.shape[-1] == n else codes[..., :n].contiguous()


def _spread_words(packed: Tensor, bits: int) -> Tensor:
    """Codes of 1, 3, 5 or 6 bits: each run of `bits` bytes is one word of eight codes, spread to a byte each."""
    size = packed.shape[-1]
    groups = -(-size // bits)
    runs = packed.new_zeros(*packed.shape[:-1], groups * bits)
    runs[..., :size] = packed
    padded = packed.new_zeros(*packed.shape[:-1], groups, _LANES)
    padded[..., :bits] = runs.unflatten(-1, (groups, bits))
    words = padded.view(torch.int64).squeeze(-1)
    lanes = torch.zeros_like(words)
    mask = (1 << bits) - 1
    for lane in range(_LANES):
        lanes |= ((words >> (bits * lane)) & mask) << (8 * lane)
    return lanes.view(torch.uint8)


def _check_bytes(name: str, tensor: Tensor) -> None:
    """Refuse what is not a uint8 tensor with a last dimension."""
    if tensor.dtype != torch.uint8:
        raise KernelError(f"{name}: got dtype {tensor.dtype}, wanted torch.uint8")
    if tensor.ndim == 0:
        raise KernelError(f"{name}: got a scalar, wanted at least one dimension")
