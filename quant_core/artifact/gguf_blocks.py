"""GGUF's blocks of 32 weights: the codes of a release's layer, in the smallest type of block that holds all of them.

A block has 32 neighbours in a row, a float16 scale d and, in some types, a float16 offset m:

    type    bytes   weight
    Q4_0    18      d * (q - 8)      q in [0, 15]
    Q4_1    20      d * q + m        q in [0, 15]
    Q5_0    22      d * (q - 16)     q in [0, 31]
    Q5_1    24      d * q + m        q in [0, 31]
    Q8_0    34      d * q            q in [-128, 127]

Codes are kept one for one. What is rounded, to float16, is scale, and m = -zero_point * scale where there is one.
Bytes as in ggml's ggml-common.h and as the package gguf reads them: d, then m, then the fifth bits (bit i of a little-
endian uint32 is weight i's), then low bits, of which a byte has those of weights i and i + 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quant_core.nn.layers import QuantLayer

BLOCK = 32
_HALF = np.dtype("<f2")


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of block: its name in GGUF, bits of a code, and whether it has an offset m."""

    name: str
    bits: int
    has_offset: bool


#: From the smallest up.
BLOCK_TYPES = (
    BlockType("Q4_0", 4, False),
    BlockType("Q4_1", 4, True),
    BlockType("Q5_0", 5, False),
    BlockType("Q5_1", 5, True),
    BlockType("Q8_0", 8, False),
)


@dataclass(frozen=True, slots=True)
class CodeBlocks:
    """Codes of a weight (C_out, K) in blocks of 32 columns, K = 32 N.

    Attributes
    ----------
    codes : array, shape (C_out, N, 32), dtype int32
        In [0, 2**bits - 1].
    scale : array, shape (C_out, N), dtype float32
    zero_point : array, shape (C_out, N), dtype int32
    """

    codes: npt.NDArray[np.int32]
    scale: npt.NDArray[np.float32]
    zero_point: npt.NDArray[np.int32]


def code_blocks(layer: QuantLayer) -> CodeBlocks | None:
    """Return the codes of a layer in blocks, None if a block would have more than one scale; K must divide by 32."""
    groups = layer.group_index.reshape(-1, BLOCK)
    if bool((groups != groups[:, :1]).any()):
        return None
    codes = layer.codes().cpu()
    channels = len(codes)
    scale, zero_point = (
        grid.cpu()[:, groups[:, 0].cpu()].expand(channels, -1) for grid in (layer.steps, layer.zero_point)
    )
    return CodeBlocks(
        codes.reshape(channels, -1, BLOCK).numpy().astype(np.int32),
        scale.float().numpy(),
        zero_point.numpy().astype(np.int32),
    )


def join_blocks(parts: Sequence[CodeBlocks], *, swapped: bool) -> CodeBlocks:
    """Return the blocks of several weights of as many columns, one below the other; `swapped`, second half first."""
    columns = [(part.codes, part.scale, part.zero_point) for part in parts]
    codes, scale, zero_point = (np.concatenate(each) for each in zip(*columns, strict=True))
    if swapped:
        codes, scale, zero_point = (np.roll(each, len(each) // 2, axis=0) for each in (codes, scale, zero_point))
    return CodeBlocks(codes, scale, zero_point)


def fitting_type(blocks: CodeBlocks) -> BlockType | None:
    """Return the smallest type of block that holds every code as it is; None if there is none."""
    values = blocks.codes - blocks.zero_point[..., None]
    low, high, top = int(values.min()), int(values.max()), int(blocks.codes.max())
    for kind in BLOCK_TYPES:
        half = 2 ** (kind.bits - 1)
        if top < 2 * half if kind.has_offset else -half <= low and high < half:
            return kind
    return None


def pack_blocks(blocks: CodeBlocks, kind: BlockType) -> npt.NDArray[np.uint8]:
    """Return the blocks' bytes, shape (C_out, N * bytes of a block); `kind` must hold the codes."""
    scale, zero_point = blocks.scale, blocks.zero_point
    parts = [_half_bytes(scale)]
    codes: npt.NDArray[Any] = blocks.codes
    if kind.has_offset:
        parts.append(_half_bytes(-zero_point * scale))
    elif kind.bits == 8:
        codes = (codes - zero_point[..., None]).astype(np.int8).view(np.uint8)
    else:
        codes = codes - zero_point[..., None] + 2 ** (kind.bits - 1)
    parts.extend(_code_bytes(codes.astype(np.uint8), kind.bits))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _half_bytes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the bytes of values rounded to float16, shape (C_out, N, 2)."""
    with np.errstate(over="ignore"):  # infinity is refused by whoever reads the blocks back
        return values.astype(_HALF)[..., None].view(np.uint8)


def _code_bytes(codes: npt.NDArray[np.uint8], bits: int) -> list[npt.NDArray[np.uint8]]:
    """Return the bytes of codes, (C_out, N, 32) uint8, in the order of a block."""
    if bits == 8:
        return [codes]
    low = codes & np.uint8(15)
    nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << np.uint8(4))
    if bits == 4:
        return [nibbles]
    return [np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little"), nibbles]
