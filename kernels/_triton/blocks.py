"""Block sizes per architecture and shape. Chosen here, in code: autotuning needs a driver, and results that repeat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kernels._triton.tuned import POINTERS, Tile
from kernels.weights import WeightLayout

# Streaming multiprocessors (compute units on gfx942): a grid smaller than this leaves some idle.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 1}
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tile of one program and how it is compiled; `k` counts codes of 8 bits (smaller codes have lanes)."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    swizzle: int = 8


def architecture(device: torch.device) -> str:
    """Name the architecture of `device` as in `PROCESSORS`: the nearest one below it that is listed."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def int_blocks(
    arch: str, m: int, n: int, layout: WeightLayout, *, heavy: bool = False, tile: Tile | None = None
) -> Blocks:
    """Blocks of an integer GEMM or convolution with M rows and N columns; `heavy` asks for more registers a value.

    A `tile` that was measured counts for weights of 8 bits with one scale a channel and a plain epilogue.

    128 x 128 is the smallest tile at which int8 tensor cores are not limited by shared memory; a grid that does not
    fill the device takes 64 columns, few rows take as few as a tensor-core instruction has. Scales of groups keep an
    int32 and a float32 sum, and long epilogues hold more beside the sum, so their tiles are half as large.
    """
    k = 64 if layout.group_size % 64 == 0 else 32
    if arch == INTERPRETER:
        return Blocks(32, 32, k, 4, 1, 2)
    if layout.bits == 8 and not layout.group_size and not heavy and (measured := _of(tile)) is not None:
        return measured
    if m <= 64:
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        return Blocks(rows, 64, k, 4, 2 if arch == "gfx942" else 4)
    stages = {"sm_80": 3, "gfx942": 2}.get(arch, 4)
    if is_grouped(arch, layout) or heavy:
        return Blocks(128, 32 if arch == "sm_100" else 64, k, 8, stages)
    tiles = -(-m // 128) * -(-n // 128)
    columns = 128 if tiles >= PROCESSORS[arch] else 64
    if layout.channels % 128 == 0 and arch in ("sm_90", "sm_100"):
        k = 128  # fewer barriers per wgmma; four stages of 32 KiB fit in 227 KiB
    return Blocks(128, columns, k, 8, stages)


def is_grouped(arch: str, layout: WeightLayout) -> bool:
    """Whether groups take registers that a large tile has none for: float scales, and multipliers before mma.sync."""
    return layout.has_group_scales or (arch == "sm_80" and layout.multiplied)


def float_blocks(
    arch: str, m: int, n: int, *, grouped: bool, dtype: torch.dtype = torch.bfloat16, heavy: bool = False
) -> Blocks:
    """Blocks of a GEMM with float activations of `dtype`; `grouped`: scales of groups; `heavy` as for `int_blocks`."""
    if arch == INTERPRETER:
        return Blocks(32, 32, 32, 4, 1, 2)
    if dtype is torch.float32:
        return _float32_blocks(arch, m)
    if m <= 64:
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        return Blocks(rows, 64, 64, 4, 2 if arch == "gfx942" else 4)
    columns = 128 if -(-m // 128) * -(-n // 128) >= PROCESSORS[arch] else 64
    if grouped or heavy:
        columns = 32 if arch == "sm_100" else 64
    return Blocks(128, columns, 64, 8, 2 if arch == "gfx942" else 3)


def _float32_blocks(arch: str, m: int) -> Blocks:
    """Blocks of a GEMM with float32 activations, which take three times the registers (`float_precision`)."""
    if m <= 64 or arch == "sm_80":
        return Blocks(16 if m <= 16 else 32, 64, 64, 4, 1 if arch == "gfx942" else 2)
    if arch == "gfx942":
        return Blocks(64, 64, 64, 8, 1)
    return Blocks(128, 32 if arch == "sm_100" else 64, 64, 8, 2)


def float_precision(arch: str, dtype: torch.dtype) -> str:
    """How Triton multiplies float activations: 'ieee', or 'tf32x3' for float32 on NVIDIA's tensor cores.

    A code less its zero point is exact in TF32, and a float32 is the sum of two of its numbers but for 2**-22 of it.
    """
    return "tf32x3" if dtype is torch.float32 and arch.startswith("sm_") else "ieee"


def fp8_blocks(arch: str, m: int, n: int, *, tile: Tile | None = None) -> Blocks:
    """Blocks of an FP8 GEMM: those of a `tile` that was measured, if there is one."""
    if arch == INTERPRETER:
        return Blocks(32, 32, 32, 4, 1, 2)
    if (measured := _of(tile)) is not None:
        return measured
    rows = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    columns = 128 if -(-m // 128) * -(-n // 128) >= PROCESSORS[arch] and m > 64 else 64
    return Blocks(rows, columns, 128 if arch != "sm_80" else 64, 8 if rows == 128 else 4, 3)


def _of(tile: Tile | None) -> Blocks | None:
    """Return the blocks of a tile that is for Triton's own pipeline."""
    if tile is None or tile.kernel != POINTERS:
        return None
    return Blocks(tile.m, tile.n, tile.k, tile.warps, tile.stages, tile.swizzle)


def splits_of_k(arch: str, tiles: int, blocks: int) -> int:
    """Pieces of K that run side by side, so that few tiles still read the weights with the whole device."""
    if arch == INTERPRETER:
        return 2 if blocks >= 4 else 1
    splits = 1
    while tiles * splits * 2 <= 2 * PROCESSORS[arch] and blocks // (splits * 2) >= 4 and splits < 16:
        splits *= 2
    return splits


def rank_block(rank: int) -> int:
    """Ranks that one step of a low-rank branch takes; 16 is the least K of a tensor-core instruction."""
    return 16 if rank <= 16 else 32
