"""Integer Linear and Conv2d on the CPU against float32 and bfloat16, layer by layer.

    taskset -c 0 python -m benchmarks.cpu_kernels [--repeats 20] [--out FILE]

Prints one JSON document: for each layer the milliseconds of float32 (the better of both memory layouts), of bfloat16
(channels last), of the integer operator, and of the quantization of its input; and the ratios of integer operator plus
quantization to both. The four run in turn, `--repeats` times, and each keeps its least time: load of other processes
falls on all of them alike. Shapes: Stable Diffusion 1.5's UNet at batch 2, and a small UNet's (48 to 96 channels).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cli import give, parser
from benchmarks.timing import take_turns, wall_ms
from benchmarks.weights import random_weight
from kernels.activations import ActivationTable
from kernels.conv import ConvGeometry
from kernels.cpu import cpu_conv2d, cpu_linear
from kernels.cpu_activation import CpuActivation, cpu_grid, quantize_cpu
from kernels.cpu_weight import pack_cpu_weight, sums_pairs_exactly
from kernels.epilogue import Epilogue

TABLE = ActivationTable(torch.tensor([0.03]), torch.tensor([120.0]), 8)


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer: images of `size` x `size` pixels, or `size` rows where `kernel` is 0 (a Linear)."""

    name: str
    batch: int
    size: int
    channels: int
    outputs: int
    kernel: int


SHAPES = (
    Shape("SD1.5 resnet 64x64", 2, 64, 320, 320, 3),
    Shape("SD1.5 resnet 32x32", 2, 32, 640, 640, 3),
    Shape("SD1.5 resnet 16x16", 2, 16, 1280, 1280, 3),
    Shape("SD1.5 shortcut 32x32", 2, 32, 640, 320, 1),
    Shape("SD1.5 attention 64x64", 1, 8192, 320, 320, 0),
    Shape("SD1.5 feed-forward 32x32", 1, 2048, 640, 5120, 0),
    Shape("small resnet 32x32", 8, 32, 48, 48, 3),
    Shape("small resnet 16x16", 8, 16, 96, 96, 3),
)


def candidates(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """Build what is timed."""
    weight = random_weight(shape.outputs, shape.channels, max(1, shape.kernel**2), 8)
    if shape.kernel == 0:
        x, w = torch.randn(shape.size, shape.channels), torch.randn(shape.outputs, shape.channels)
        half, w_half = x.bfloat16(), w.bfloat16()
        grid = cpu_grid(TABLE)
        codes, packed = quantize_cpu(x, grid, TABLE.bits), pack_cpu_weight([weight])
        return {
            "float32": lambda: F.linear(x, w),
            "bfloat16": lambda: F.linear(half, w_half),
            "quantize": lambda: quantize_cpu(x, grid, TABLE.bits).codes,
            "quantize bfloat16": lambda: quantize_cpu(half, grid, TABLE.bits).codes,
            "integer": lambda: cpu_linear(codes, packed, Epilogue()),
            "integer to bfloat16": lambda: cpu_linear(codes, packed, Epilogue(torch.bfloat16)),
        }
    pad = shape.kernel // 2
    image = torch.randn(shape.batch, shape.channels, shape.size, shape.size)
    kernel = torch.randn(shape.outputs, shape.channels, shape.kernel, shape.kernel)
    last, kernel_last = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
    half, kernel_half = last.bfloat16(), kernel_last.bfloat16()
    rows, half_rows = last.permute(0, 2, 3, 1), half.permute(0, 2, 3, 1)
    geometry = ConvGeometry((shape.kernel, shape.kernel), padding=(pad, pad))
    grid, packed = cpu_grid(TABLE), pack_cpu_weight([weight], geometry)

    def quantize(rows: Tensor) -> CpuActivation:
        return quantize_cpu(rows, grid, TABLE.bits, padding=(pad, pad))

    codes = quantize(rows)
    return {
        "float32": lambda: F.conv2d(image, kernel, padding=pad),
        "float32 channels last": lambda: F.conv2d(last, kernel_last, padding=pad),
        "bfloat16": lambda: F.conv2d(half, kernel_half, padding=pad),
        "quantize": lambda: quantize(rows).codes,
        "quantize bfloat16": lambda: quantize(half_rows).codes,
        "integer": lambda: cpu_conv2d(codes, packed, Epilogue()),
        "integer to bfloat16": lambda: cpu_conv2d(codes, packed, Epilogue(torch.bfloat16)),
    }


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """Time the candidates of one layer in turn; milliseconds, the least of each."""
    best = {name: min(times) for name, times in take_turns(candidates(shape), repeats, wall_ms).items()}
    float32 = min(ms for name, ms in best.items() if name.startswith("float32"))
    total, half_total = best["integer"] + best["quantize"], best["integer to bfloat16"] + best["quantize bfloat16"]
    return {
        "layer": shape.name,
        "milliseconds": {name: round(ms, 4) for name, ms in best.items()},
        "to_float32": round(total / float32, 3),
        "to_bfloat16": round(half_total / best["bfloat16"], 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--repeats", type=int, default=20)
    command.add_argument("--out", type=Path)
    options = command.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        layers = [measure(shape, options.repeats) for shape in SHAPES]
    give(
        {
            "threads": 1,
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "exact_int8": sums_pairs_exactly(),
            "layers": layers,
        },
        options.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
