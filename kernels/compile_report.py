"""Compile every Triton kernel for every architecture, without a GPU, and report what each takes.

    python -m kernels.compile_report [--write docs/kernels.md | --check docs/kernels.md] [--arch sm_90 ...]
        [--only TEXT] [--json]

For each kernel, at the blocks that `kernels._triton.blocks` chooses for a typical shape: registers of a thread, bytes
of its stack (spilled registers), shared memory of a program, the matrix instructions in its assembly, and on sm_90 what
one turn of its main loop consists of. Exit code 1 if a spill is over SPILL_LIMIT, shared memory over what the
architecture has, a GEMM found no matrix instruction, or a loop of our own prepares operands or waits for every product;
with --check also if a kernel takes more than the file's table says: bytes spilled, or instructions of its main loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.weights import WeightLayout

if TYPE_CHECKING:
    from kernels._triton.blocks import Blocks

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# A few spilled words outside the inner loop cost nothing that could be measured; a spilled accumulator does.
SPILL_LIMIT = 64
# A loop of our own is looked at by itself; around it, what a tile's sums go through once may spill more.
OWN_SPILL_LIMIT = 192
# Shared memory that one program may have, bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_PRODUCT = re.compile(r"[HIQ]GMMA")
_FROM_REGISTERS = re.compile(r"[HIQ]GMMA\S* R\d+, R\d+, gdesc")
# How a turn is written: what there always is, and what is left out if there is none.
_ALWAYS = {
    "wgmma": "products", "in flight": "in_flight", "stores": "stores", "conversions": "conversions",
    "barriers": "barriers", "others": "others",
}  # fmt: skip
_SOMETIMES = {"seldom": "seldom", "from registers": "from_registers"}
_WORDS = _ALWAYS | _SOMETIMES
# Of SASS: products; stores to shared memory, and of spilled registers; conversions (I2F.RP and F2I are of integer
# divisions); barriers.
_COUNTED = (r"[HIQ]GMMA", r"STS|STSM|STL", r"I2F(?!\.RP|\.U32\.RP)|F2F|I2IP|PRMT|HADD2|HFMA2", r"BAR")
_MATRIX = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma")
# How much more of the rest a turn may have than the table says.
MORE_OTHERS = 1.1
#: Ends the names of kernels whose main loop may do nothing but copy and multiply.
OWN_LOOP = ", own loop"
_BEGIN, _END = "<!-- compile_report begin -->", "<!-- compile_report end -->"

_TYPES = {
    **dict.fromkeys(("x_scale_ptr", "scale_ptr", "run_scale_ptr", "partial_ptr", "group_mean_ptr"), "*fp32"),
    **dict.fromkeys(
        ("divisor_ptr", "channel_scale_ptr", "group_rstd_ptr", "mean_ptr", "squares_ptr", "low_ptr", "high_ptr", "eps"),
        "*fp32",
    ),
    **dict.fromkeys(("x_zero_ptr", "run_zero_ptr", "channel_ptr", "total_ptr", "x_sum_ptr"), "*i32"),
    **dict.fromkeys(("codes_ptr", "zero_ptr"), "*i8"),
    **dict.fromkeys(("bias_ptr", "residual_ptr", "gate_ptr", "down_ptr", "up_ptr", "out_ptr", "weight_ptr"), "*bf16"),
    "shift_ptr": "*bf16",
    "index_ptr": "*i64",
    "eps": "fp32",
}
_ALIGNED = (
    "K",
    "C",
    "n",
    "N",
    "stride_x",
    "stride_w",
    "stride_out",
    "stride_residual",
    "stride_gate",
    "stride_b",
    "stride_p",
    "stride_s",
    "stride_multiplier",
    "stride_shift",
    "stride_h",
    "stride_w_in",
    "tap_bytes",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One compilation: a kernel, its constants, the types that differ from the usual, warps and stages."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Loop:
    """Instructions of one turn of a main loop on sm_90, in each warp.

    `products` are wgmma's; `in_flight` how many groups of them are still running when a turn ends; `stores` and
    `conversions` (also shifts and permutations of bytes) prepare operands in registers, which a loop of its own does
    not; `barriers` are of all warps, `others` the rest: addresses and counters, mostly. `seldom` are what a branch may
    skip: where a tile begins, once in all its turns. `from_registers` are the products whose first operand is in
    registers, as weights that were unpacked there are.
    """

    products: int
    in_flight: int
    stores: int
    conversions: int
    barriers: int
    others: int
    seldom: int = 0
    from_registers: int = 0

    def __str__(self) -> str:
        counts = {word: getattr(self, field) for word, field in _WORDS.items()}
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count or word in _ALWAYS)

    @classmethod
    def parse(cls, text: str) -> Loop | None:
        """Read what `__str__` wrote; None if that is empty."""
        counts = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z ]+)", text)}
        return cls(**{field: counts.get(word, 0) for word, field in _WORDS.items()}) if counts else None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes. `registers` are of one thread (vector registers on gfx942), the rest are bytes."""

    kernel: str
    arch: str
    registers: int
    spilled: int
    shared: int
    matrix: str
    loop: Loop | None = None

    @property
    def problem(self) -> str | None:
        """What is over a limit."""
        spills = OWN_SPILL_LIMIT if self.kernel.endswith(OWN_LOOP) else SPILL_LIMIT
        if self.spilled > spills:
            return f"{self.kernel} on {self.arch}: got {self.spilled} spilled bytes, wanted at most {spills}"
        if self.shared > SHARED_LIMIT[self.arch]:
            limit = SHARED_LIMIT[self.arch]
            return f"{self.kernel} on {self.arch}: got {self.shared} bytes of shared memory, wanted at most {limit}"
        if self.matrix == "none" and self.kernel.startswith(("linear", "conv")):
            return f"{self.kernel} on {self.arch}: got no matrix instruction, wanted at least one"
        # Sums that are scaled by groups end within the loop.
        if not self.kernel.endswith(OWN_LOOP) or (" g" in self.kernel and "of integers" not in self.kernel):
            return None
        if self.loop is None or self.loop.in_flight < 1 or self.loop.stores:
            return f"{self.kernel} on {self.arch}: got {self.loop} in its loop, wanted one in flight, nothing stored"
        if "W4" in self.kernel and self.loop.from_registers < self.loop.products:
            return f"{self.kernel} on {self.arch}: got {self.loop} in its loop, wanted all products from registers"
        if "W4" not in self.kernel and self.loop.conversions:
            return f"{self.kernel} on {self.arch}: got {self.loop} in its loop, wanted nothing prepared"
        return None


def cases(arch: str) -> Iterator[Case]:
    """Yield what is compiled for `arch`: SDXL's and DiT's shapes, and each variant of a kernel's inner loop."""
    yield from _linear_cases(arch)
    yield from _conv_cases(arch)
    yield from _widths_cases(arch)
    yield from _float_cases(arch)
    yield from _activation_cases()
    yield from _other_cases(arch)
    if arch == "sm_90":
        yield from _hopper_cases()


_EPILOGUE = {"bias_ptr": None, "residual_ptr": None, "down_ptr": None, "up_ptr": None, "channel_ptr": None}
_BIAS = {"residual_ptr": None, "down_ptr": None, "up_ptr": None, "channel_ptr": None}
# label, layout, symmetric activation
_WEIGHTS = (
    ("W8A8 symmetric", WeightLayout(8, 640, 1, 32, 0, True), True),
    ("W8A8", WeightLayout(8, 640, 1, 32, 0, False), False),
    ("W4A8", WeightLayout(4, 640, 1, 64, 0, False), False),
    ("W4A8 g64", WeightLayout(4, 640, 1, 32, 64, False), False),
    ("W4A8 g128", WeightLayout(4, 640, 1, 64, 128, False), False),
    ("W4A8 g64 of integers", WeightLayout(4, 640, 1, 64, 64, False, True), False),
    ("W8A8 g64", WeightLayout(8, 640, 1, 32, 64, False), False),
    ("W2A8", WeightLayout(2, 640, 1, 32, 0, False), False),
)


def _weight_constants(layout: WeightLayout, k: int) -> dict[str, Any]:
    """Return what a layout fixes in a kernel of integers that reads K in steps of `k`."""
    absent = {} if layout.multiplied else {"factor_ptr": None}
    lane = k if layout.bits == 8 else layout.lane
    return {"BITS": layout.bits, "LANE": lane, "GROUP_SIZE": layout.group_size, **absent}


def linear_case(
    label: str, layout: WeightLayout, blocks: Blocks, *, x_symmetric: bool, rank: int = 0, full: bool = False
) -> Case:
    """Return a product of integers; with channels, bias, residual and branch if `full`, else with a bias."""
    from kernels._triton.blocks import rank_block
    from kernels._triton.gemm import linear_int_kernel

    constants = {
        **({} if full else _BIAS), **_weight_constants(layout, blocks.k), "SYMMETRIC": layout.symmetric,
        "X_SYMMETRIC": x_symmetric, "RANK": rank, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n,
        "BLOCK_R": rank_block(rank), "SWIZZLE": blocks.swizzle,
    }  # fmt: skip
    return Case(
        f"linear {label}, {blocks.m} x {blocks.n}", linear_int_kernel, constants, _weight_types(layout), blocks.warps,
        blocks.stages,
    )  # fmt: skip


def conv_case(label: str, layout: WeightLayout, blocks: Blocks, *, x_symmetric: bool, taps: int, stride: int) -> Case:
    """Return a convolution of integers of `taps` x `taps`."""
    from kernels._triton.conv import conv2d_int_kernel

    constants = {
        **_BIAS, "TAPS_H": taps, "TAPS_W": taps, "STRIDE_H": stride, "STRIDE_W": stride,
        "PAD_H": taps // 2, "PAD_W": taps // 2, "DILATION_H": 1, "DILATION_W": 1,
        **_weight_constants(layout, blocks.k), "SYMMETRIC": layout.symmetric, "X_SYMMETRIC": x_symmetric,
        "RANK": 0, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_R": 16, "SWIZZLE": blocks.swizzle,
    }  # fmt: skip
    return Case(
        f"conv {taps}x{taps}/{stride} {label}, {blocks.m} x {blocks.n}", conv2d_int_kernel, constants,
        _weight_types(layout), blocks.warps, blocks.stages,
    )  # fmt: skip


def gathered(case: Case, *, added: bool) -> Case:
    """Return a product whose rows name their output channels, perhaps with a residual."""
    given = ("channel_ptr", "residual_ptr") if added else ("channel_ptr",)
    return replace(case, constants={key: value for key, value in case.constants.items() if key not in given})


def _linear_cases(arch: str) -> Iterator[Case]:
    from kernels._triton.blocks import int_blocks

    for m, n in ((8192, 2560), (16, 2560)):
        for label, layout, x_symmetric in _WEIGHTS:
            yield linear_case(label, layout, int_blocks(arch, m, n, layout), x_symmetric=x_symmetric)
            if m > 64 and label == "W4A8":
                blocks = int_blocks(arch, m, n, layout, heavy=True)
                case = linear_case(label, layout, blocks, x_symmetric=x_symmetric, rank=32, full=True)
                yield replace(case, label=f"{case.label}, all of the epilogue")


def _conv_cases(arch: str) -> Iterator[Case]:
    from kernels._triton.blocks import int_blocks

    for label, linear, x_symmetric in _WEIGHTS:
        for taps, stride in ((3, 1), (3, 2), (1, 1)):
            if (taps, stride) != (3, 1) and label not in ("W8A8", "W4A8"):
                continue
            layout = replace(linear, taps=taps * taps)
            blocks = int_blocks(arch, 8192, 2560, layout, heavy=arch == "sm_80" and not x_symmetric)
            yield conv_case(label, layout, blocks, x_symmetric=x_symmetric, taps=taps, stride=stride)
            if (taps, stride, layout.group_size) == (3, 1, 0) and not layout.symmetric:
                blocks = int_blocks(arch, 8192, 2560, layout, heavy=True)
                case = conv_case(label, layout, blocks, x_symmetric=x_symmetric, taps=taps, stride=stride)
                yield replace(gathered(case, added=True), label=f"{case.label}, of mixed bits, added")


def _widths_cases(arch: str) -> Iterator[Case]:
    """Yield one launch for rows of several widths: per channel as mixed bits have them, and with whole group scales."""
    from kernels._triton.widths import (
        WIDTHS,
        conv2d_widths_kernel,
        layout_constants,
        linear_widths_kernel,
        widths_blocks,
    )

    for (kernel, taps, m), multiplied in itertools.product(
        ((linear_widths_kernel, 1, 8192), (linear_widths_kernel, 1, 16), (conv2d_widths_kernel, 9, 8192)),
        (False, True),
    ):
        if multiplied and arch == "sm_80":
            continue
        group = 64 if multiplied else 0
        layouts = [
            WeightLayout(2, 640, taps, 32, group, False, multiplied),
            WeightLayout(4, 640, taps, 64, group, False, multiplied),
            WeightLayout(8, 640, taps, 32, 0, symmetric=multiplied),
        ]
        blocks = widths_blocks(arch, m, 2560, layouts)
        absent = {} if multiplied else {f"factor{bits}_ptr": None for bits in WIDTHS if bits < 8}
        constants = {
            **{key: value for key, value in _BIAS.items() if key != "channel_ptr"}, **absent,
            **layout_constants(layouts, blocks.k), "X_SYMMETRIC": False, "RANK": 0, "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n, "BLOCK_R": 16, "SWIZZLE": blocks.swizzle,
        }  # fmt: skip
        if taps > 1:
            constants |= dict.fromkeys(("TAPS_H", "TAPS_W"), 3) | dict.fromkeys(("PAD_H", "PAD_W"), 1)
            constants |= dict.fromkeys(("STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W"), 1)
        types = {"x_ptr": "*i8"}
        for bits in WIDTHS:
            types |= {f"w{bits}_ptr": "*i8" if bits == 8 else "*u8", f"scale{bits}_ptr": "*fp32"}
            types |= {f"zero{bits}_ptr": "*i8", f"factor{bits}_ptr": "*i16"}
            types |= {f"{name}{bits}_ptr": "*i32" for name in ("total", "channel")}
        what = f"{'linear' if taps == 1 else 'conv 3x3/1'} of 2, 4 and 8 bits"
        label = f"{what}{' g64 of integers' if multiplied else ''}, {blocks.m} x {blocks.n}"
        yield Case(label, kernel, constants, types, blocks.warps, blocks.stages)


def _float_cases(arch: str) -> Iterator[Case]:
    import torch

    from kernels._triton.blocks import float_blocks, float_precision, is_grouped
    from kernels._triton.gemm import linear_float_kernel, sum_splits_kernel

    for (m, heavy), dtype in itertools.product(
        ((8192, False), (8192, True), (16, False)), (torch.bfloat16, torch.float32)
    ):
        for bits, lane, group, multiplied in (
            (4, 64, 0, False),
            (4, 32, 64, False),
            (4, 64, 64, True),
            (8, 64, 0, False),
        ):
            layout = WeightLayout(bits, 640, 1, lane, group, False, multiplied)
            blocks = float_blocks(arch, m, 2560, grouped=is_grouped(arch, layout), dtype=dtype, heavy=heavy)
            splits = 4 if m <= 64 else 1
            constants = {
                **_weight_constants(layout, lane), "RANK": 32 if heavy else 0, "BLOCK_M": blocks.m,
                "BLOCK_N": blocks.n, "BLOCK_R": 32 if heavy else 16, "SPLITS": splits, "SWIZZLE": blocks.swizzle,
                "PRECISION": float_precision(arch, dtype),
                **({} if heavy else _BIAS), **({"partial_ptr": None} if splits == 1 else {}),
            }  # fmt: skip
            parts = [f"linear W{bits}A{32 if dtype is torch.float32 else 16}{f' g{group}' if group else ''}"]
            parts[0] += " of integers" if multiplied else ""
            parts += [f"{blocks.m} x {blocks.n}", *([f"K in {splits}"] if splits > 1 else [])]
            types = {**_weight_types(layout), "x_ptr": "*fp32" if dtype is torch.float32 else "*bf16"}
            yield Case(
                ", ".join([*parts, *(["all of the epilogue"] if heavy else [])]),
                linear_float_kernel, constants, types, blocks.warps, blocks.stages,
            )  # fmt: skip
    constants = {"RANK": 0, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_R": 16, "SPLITS": 4}
    yield Case("sum of splits", sum_splits_kernel, {**_BIAS, **constants}, {}, 4, 1)
    constants |= {"RANK": 32, "BLOCK_R": 32}
    yield Case("sum of splits, all of the epilogue", sum_splits_kernel, constants, {}, 4, 1)


def _plain(label: str, kernel: Any, types: dict[str, str] | None = None, **constants: Any) -> Case:
    return Case(label, kernel, constants, {"x_ptr": "*bf16", **(types or {})}, 1 if "ROWS" in constants else 4, 1)


# Rows of 1280 columns.
_TOKEN = {"ROWS": 1, "BLOCK_A": 1024, "BLOCK_B": 256, "WHOLE": True}
_CODES = {"TOP": 255, "HALF": 128, "FUSED": True}
_TABLE = {"zero_ptr": "*fp32"}
_NORMED = {"multiplier_ptr": "*bf16"}
_HEADS = {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}


def _activation_cases() -> Iterator[Case]:
    from kernels._triton import activations

    own, table = {"zero_ptr": "*i32"}, {"zero_ptr": "*fp32"}
    yield _plain("quantize by table, flat", activations.by_table_flat_kernel, table, **_CODES, BLOCK=4096)
    for scaled in (False, True):
        label = ", scaled channels" if scaled else ""
        divisor = {} if scaled else {"divisor_ptr": None}
        scale = {} if scaled else {"channel_scale_ptr": None}
        grid = {**scale, **_CODES, "SYMMETRIC": False}
        blocks: dict[str, Any] = {"BLOCK_M": 32, "BLOCK_C": 128}
        yield _plain(f"quantize by table{label}", activations.by_table_kernel, table, **divisor, **_CODES, **blocks)
        yield _plain(f"quantize tokens{label}", activations.per_token_kernel, own, **grid, **_TOKEN)
        yield _plain(f"quantize long tokens{label}", activations.per_long_token_kernel, own, **grid, BLOCK_C=2048)
        yield _plain(f"range of samples{label}", activations.sample_range_kernel, **scale, BLOCK_N=2048)
        yield _plain(f"quantize samples{label}", activations.per_sample_kernel, own, **grid, CHUNKS=256, BLOCK_N=2048)


def _other_cases(arch: str) -> Iterator[Case]:
    from kernels._triton import norms
    from kernels._triton.blocks import fp8_blocks
    from kernels._triton.fp8 import linear_fp8_kernel, quantize_fp8_kernel, quantize_long_fp8_kernel
    from kernels._triton.gates import gate_fp8_kernel, gate_quantize_kernel
    from kernels._triton.rotary import rms_norm_rotary_kernel

    yield _plain("group norm: chunks", norms.channel_stats_kernel, BLOCK_P=32, BLOCK_C=128)
    yield _plain("group norm: merge", norms.merge_stats_kernel, GROUPS=32, WIDTH=20, CHUNKS=16, BLOCK_W=32)
    yield _plain(
        "group norm + SiLU + quantize", norms.group_norm_quantize_kernel, _TABLE, **_CODES, GROUPS=32, WIDTH=20,
        SILU=True, BLOCK_M=32, BLOCK_C=128, divisor_ptr=None,
    )  # fmt: skip
    absent = {"weight_ptr": None, "bias_ptr": None, "FLOOR": 1e-12}
    own = {"scale_ptr": None, "zero_ptr": None, "index_ptr": None}
    tokens = {**_TOKEN, **absent, "SYMMETRIC": False, "TOGETHER": True}
    layer_norm = "layer norm + modulate + quantize"
    yield _plain(f"{layer_norm} tokens", norms.layer_norm_quantize_kernel, _NORMED, **_CODES, **tokens, **own)
    yield _plain(f"{layer_norm} by table", norms.layer_norm_quantize_kernel, _NORMED | _TABLE, **_CODES, **tokens)
    for label, gated, tanh in (("GEGLU", True, False), ("GELU", False, False), ("GELU by tanh", False, True)):
        blocks: dict[str, Any] = {"BLOCK_M": 8, "BLOCK_C": 512, "divisor_ptr": None, "TOP": 255, "HALF": 128}
        yield _plain(f"{label} + quantize", gate_quantize_kernel, _TABLE, GATED=gated, TANH=tanh, **blocks)
    heads: dict[str, Any] = {"D": 128, "BLOCK_H": 8, "BLOCK_D": 128}
    yield Case("RMSNorm + rotary", rms_norm_rotary_kernel, heads, _HEADS, 1, 1)
    if arch in ("sm_90", "sm_100"):
        values, limits = {"values_ptr": "*fp8e4nv"}, {"MAX": 448.0, "FLOOR": 1e-12, "FUSED": True}
        constants = tokens | own | {"TOP": 448.0, "HALF": 0, "FUSED": True, "run_zero_ptr": None}
        normed = _NORMED | {"codes_ptr": "*fp8e4nv"}
        yield _plain(f"{layer_norm} FP8", norms.layer_norm_quantize_kernel, normed, **constants)
        yield _plain("quantize FP8", quantize_fp8_kernel, values, **limits, **_TOKEN)
        for label, gated, tanh in (("GEGLU", True, False), ("GELU by tanh", False, True)):
            yield _plain(f"{label} + FP8", gate_fp8_kernel, values, GATED=gated, TANH=tanh, **limits, **_TOKEN)
        yield _plain("quantize FP8, long rows", quantize_long_fp8_kernel, values, **limits, BLOCK_K=2048)
        tile = fp8_blocks(arch, 8192, 2560)
        constants = {
            **_EPILOGUE, "gate_ptr": None, "RANK": 0, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
            "BLOCK_R": 16, "SWIZZLE": tile.swizzle,
        }  # fmt: skip
        del constants["channel_ptr"]
        types = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv"}
        yield Case(f"linear FP8, {tile.m} x {tile.n}", linear_fp8_kernel, constants, types, tile.warps, tile.stages)


@dataclass(frozen=True, slots=True)
class OwnTile:
    """A tile of the main loop that Hopper has of its own; `rectangle` of pixels of a 3x3 convolution, if it is one.

    `group` columns share a scale; a residual may be `added`.
    """

    label: str
    element: str
    m: int
    n: int
    k: int
    warps: int
    stages: int
    halves: int = 1
    rectangle: tuple[int, int] | None = None
    group: int = 0
    added: bool = False


_OWN = (
    OwnTile("linear W8A8", "i8", 128, 128, 128, 4, 3, 2),
    OwnTile("linear W8A8", "i8", 256, 128, 128, 8, 3),
    OwnTile("linear W8A8", "i8", 128, 160, 64, 4, 4, 2),
    OwnTile("conv 3x3/1 W8A8", "i8", 128, 160, 64, 4, 4, 2, (2, 64)),
    OwnTile("linear FP8", "fp8e4nv", 128, 160, 64, 4, 4, 2),
    OwnTile("linear W8A8 g128", "i8", 64, 128, 128, 4, 2, group=128),
    OwnTile("linear W8A8 g128", "i8", 128, 128, 128, 8, 4, group=128),
    OwnTile("linear FP8", "fp8e4nv", 128, 256, 128, 8, 3),
    OwnTile("conv 3x3/1 W8A8", "i8", 128, 128, 128, 4, 3, 2, (2, 64)),
    OwnTile("conv 3x3/1 W8A8 g128", "i8", 64, 128, 128, 4, 2, rectangle=(1, 64), group=128),
)
_FOUR, _FOUR_G64, _FOUR_G32 = (
    WeightLayout(4, 640, 1, 32 if group == 32 else 64, group, False, group > 0) for group in (0, 64, 32)
)
# Packed weights, multiplied transposed.
_OWN_PACKED = (
    (OwnTile("linear W4A8", "i8", 128, 128, 128, 4, 3, 2), _FOUR),
    (OwnTile("linear W4A8 g64 of integers", "i8", 128, 128, 128, 4, 3, 2), _FOUR_G64),
    (OwnTile("linear W4A8 g32 of integers", "i8", 128, 128, 128, 4, 3, 2), _FOUR_G32),
    (OwnTile("linear W4A8 g64 of integers", "i8", 256, 128, 128, 8, 3), _FOUR_G64),
    (OwnTile("linear W4A8 g64 of integers", "i8", 160, 128, 128, 4, 3, 2), _FOUR_G64),
    (OwnTile("linear W4A8 g64 of integers", "i8", 128, 128, 128, 4, 3, 2, added=True), _FOUR_G64),
    (OwnTile("linear W4A8 g64 of integers", "i8", 256, 128, 128, 8, 3, added=True), _FOUR_G64),
    (OwnTile("conv 3x3/1 W4A8 g64 of integers", "i8", 128, 128, 128, 4, 3, 2, (2, 64)), _FOUR_G64),
    (OwnTile("conv 3x3/1 W4A8 g64 of integers", "i8", 256, 128, 128, 8, 3, rectangle=(4, 64)), _FOUR_G64),
)


def _hopper_cases() -> Iterator[Case]:
    yield from map(own_case, _OWN)
    for tile, layout in _OWN_PACKED:
        yield own_case(tile, layout)


def own_case(tile: OwnTile, layout: WeightLayout | None = None) -> Case:
    """Return a product of Hopper's own loop with a bias; packed if the weight's `layout` is one of 4 bits."""
    from triton.experimental.gluon import language as gl

    from kernels._triton.hopper import product_kernel
    from kernels._triton.hopper_launch import group_rows, instruction_layout, largest_power

    packed, k = layout is not None, tile.k
    m, n = (largest_power(tile.m), tile.n) if packed else (tile.m, largest_power(tile.n))
    tail, lead = tile.m - m + tile.n - n, [m] if tile.rectangle is None else [1, *tile.rectangle]
    taps, is_int = 3 if tile.rectangle else 1, tile.element == "i8"
    group = layout.group_size if layout is not None else 0
    constants = {
        "SUM": gl.int32 if is_int else gl.float32,
        "LAYOUT": instruction_layout(tile.warps, m if packed else n, is_int), "TAPS_H": taps, "TAPS_W": taps,
        "PAD_H": taps // 2, "PAD_W": taps // 2, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "HALVES": tile.halves,
        "GROUP_SIZE": group or tile.group, "LANE": 0 if layout is None else layout.lane, "TAIL": tail,
        "TAIL_LAYOUT": instruction_layout(tile.warps, tail or n, is_int), "SWIZZLE": 8, "STAGES": tile.stages,
        "x_sum_ptr": None, "gate_ptr": None, **({} if tile.added else {"residual_ptr": None}),
        **({} if tail else {"tail_desc": None, "out_tail_desc": None}), **({} if group else {"factor_desc": None}),
        **({} if packed and not group else {"zero_ptr": None}),
        **({} if is_int else {"x_zero_ptr": None, "total_ptr": None}),
    }  # fmt: skip
    types = {
        "x_desc": _descriptor(tile.element, [*lead, k]),
        "w_desc": _descriptor("u8" if packed else tile.element, [n, k // 2 if packed else k]),
        "out_desc": _descriptor("bf16", [*lead, n // tile.halves]),
    }
    if tail:
        types |= {
            "tail_desc": _descriptor(tile.element, [tail, k]),
            "out_tail_desc": _descriptor("bf16", [tail, n] if packed else [*lead, tail]),
        }
    if group:
        types["factor_desc"] = _descriptor("i16", [group_rows(group, k), n])
    if tile.group:
        types["total_ptr"] = "*fp32"
    label = f"{tile.label}, {tile.m} x {tile.n}{', added' if tile.added else ''}{OWN_LOOP}"
    return Case(label, product_kernel, constants, types, tile.warps, tile.stages)


def _descriptor(element: str, block: list[int]) -> str:
    """Return the type of a TMA descriptor, as Gluon writes it."""
    from triton.experimental.gluon import language as gl

    types = {"i8": gl.int8, "u8": gl.uint8, "i16": gl.int16, "fp8e4nv": gl.float8e4nv, "bf16": gl.bfloat16}
    layout = gl.NVMMASharedLayout.get_default_for(block, types[element])
    return f"tensordesc<{element}[{','.join(map(str, block))}],{layout!r}>"


def _weight_types(layout: WeightLayout) -> dict[str, str]:
    """Types of an integer kernel's tensors that depend on the weight."""
    types = {"x_ptr": "*i8", "w_ptr": "*i8" if layout.bits == 8 else "*u8", "factor_ptr": "*i16"}
    return types | ({"scale_ptr": "*bf16", "total_ptr": "*i16"} if layout.has_group_scales else {})


def compile_case(case: Case, arch: str) -> Usage:
    """Compile one kernel and read what it takes from the binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = case.kernel.arg_names
    types = {name: case.types.get(name) or _TYPES.get(name, "i32") for name in names}
    signature = {name: "constexpr" if name in case.constants else types[name] for name in names}
    aligned = {i for i, name in enumerate(names) if types[name].startswith("*") or name in _ALIGNED}
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in case.constants}
    is_gluon = "LAYOUT" in case.constants
    source = GluonASTSource if is_gluon else ASTSource
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    options: dict[str, Any] = {"num_warps": case.warps, "enable_fp_fusion": False}
    if not is_gluon:
        options |= {"num_stages": case.stages}
    compiled = triton.compile(source(case.kernel, signature, case.constants, attrs), target=target, options=options)
    assembly = compiled.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    found = _MATRIX.findall(assembly)
    registers, spilled = _amd_usage(assembly) if arch.startswith("gfx") else _nvidia_usage(compiled.asm["cubin"])
    matrix = f"{found[0]} x {len(found)}" if found else "none"
    loop = main_loop(_disassembled(compiled.asm["cubin"])) if arch == "sm_90" and found else None
    return Usage(case.label, arch, registers, spilled, compiled.metadata.shared, matrix, loop)


def _amd_usage(assembly: str) -> tuple[int, int]:
    registers = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return int(registers[0]), 4 * int(spills[0])


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def _disassembled(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def main_loop(assembly: str) -> Loop | None:
    """Count the instructions of the innermost loop that multiplies matrices; None if none does."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)(.*?);", line):
            if jump := re.search(r"\(\.L_x_\d+\)", found[2]):
                jumps.append((len(operations), jump[0][1:-1]))
            keep = found[1].startswith("WARPGROUP.DEPBAR") or _PRODUCT.match(found[1])
            operations.append(found[1] + (found[2] if keep else ""))
    bodies = [range(labels[to], at + 1) for at, to in jumps if labels.get(to, at + 1) <= at]
    loops = [body for body in bodies if any(_PRODUCT.match(operations[place]) for place in body)]
    if not loops:
        return None
    whole = min(loops, key=len)
    skipped = {
        place for at, to in jumps if at in whole and labels.get(to) in whole for place in range(at + 1, labels[to])
    }
    body = [operations[place] for place in whole if place not in skipped]
    waits = [int(name.split("gsb0,")[1].strip(), 16) for name in body if name.startswith("WARPGROUP.DEPBAR")]
    counts = [sum(bool(re.match(kind, name)) for name in body) for kind in _COUNTED]
    products, stores, conversions, barriers = counts
    others = len(body) - sum(counts)
    registers = sum(bool(_FROM_REGISTERS.match(name)) for name in body)
    return Loop(products, min(waits, default=0), stores, conversions, barriers, others, len(skipped), registers)


def report(architectures: Sequence[str], only: str = "") -> list[Usage]:
    """Compile every case whose label contains `only`."""
    found = [(case, arch) for arch in architectures for case in cases(arch) if only in case.label]
    return [compile_case(case, arch) for case, arch in found]


def problems(usages: Sequence[Usage]) -> list[str]:
    """Say what is over a limit, a line each."""
    return [usage.problem for usage in usages if usage.problem is not None]


def grown(usages: Sequence[Usage], text: str) -> list[str]:
    """Say what takes more than the table in `text` (of `table`) says, a line each.

    Addresses and counters may grow by MORE_OTHERS, since compilers order them as they like; what spills, prepares
    operands, synchronizes, or waits for products may not grow at all.
    """
    known = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[3].isdigit():
            known[cells[0], cells[1]] = (int(cells[3]), Loop.parse(cells[6]))
    lines = []
    for usage in usages:
        spilled, was = known.get((usage.kernel, usage.arch), (None, None))
        if spilled is None:
            lines.append(f"{usage.kernel} on {usage.arch}: got a kernel that the table lacks, wanted --write")
            continue
        if usage.spilled > spilled or _is_larger(usage.loop, was):
            got = f"{usage.spilled} spilled bytes, a turn of {usage.loop or 'nothing'}"
            lines.append(f"{usage.kernel} on {usage.arch}: got {got}, wanted at most {spilled}, {was or 'nothing'}")
    return lines


def _is_larger(loop: Loop | None, was: Loop | None) -> bool:
    """Whether a loop takes more than it did."""
    if loop is None or was is None:
        return (loop is None) != (was is None)
    if loop.in_flight < was.in_flight or loop.others + loop.seldom > (was.others + was.seldom) * MORE_OTHERS:
        return True
    if loop.from_registers < was.from_registers:
        return True
    counts = ("products", "stores", "conversions", "barriers")
    return any(getattr(loop, name) > getattr(was, name) for name in counts)


def table(usages: Sequence[Usage], text: str = "") -> str:
    """Draw the table of docs/kernels.md, with the rows of the table in `text` that are of other kernels that exist."""
    head = ("kernel", "architecture", "registers", "spilled bytes", "shared KiB", "matrix instructions", "one turn")
    rows = {}
    if text:
        known = {(case.label, arch) for arch in ARCHITECTURES for case in cases(arch)}
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        rows = {(each[0], each[1]): each for each in cells if len(each) == len(head) and (each[0], each[1]) in known}
    for u in usages:
        counts = (u.registers, u.spilled, f"{u.shared / 1024:.1f}", u.matrix, u.loop or "")
        rows[u.kernel, u.arch] = [u.kernel, u.arch, *map(str, counts)]
    order = sorted(rows, key=lambda row: (row[0], ARCHITECTURES.index(row[1])))
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(rows[row])} |" for row in order])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="compile kernels whose label contains this")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this file; others' rows stay")
    parser.add_argument("--check", type=Path, help="compare with the table between the marks of this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET: got an interpreter, wanted it unset, since it compiles nothing")
    usages = report(options.arch, options.only)
    text = json.dumps([asdict(usage) for usage in usages], indent=1) if options.json else table(usages)
    if options.write:
        before, _, rest = options.write.read_text().partition(_BEGIN)
        old, _, after = rest.partition(_END)
        options.write.write_text(f"{before}{_BEGIN}\n{table(usages, old)}\n{_END}{after}")
    sys.stdout.write(text + "\n")
    found = problems(usages) + ([] if options.check is None else grown(usages, options.check.read_text()))
    sys.stderr.write("".join(line + "\n" for line in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
