"""The Triton kernels on a GPU, on shapes of SDXL's UNet and of a DiT-XL, against what is there already.

    python -m benchmarks.kernels [--batch 8] [--repeats 50] [--out FILE]

Prints one JSON document: for each layer and each candidate the microseconds (median of `--repeats`, timed by CUDA
events, the L2 cache cleared before each), tera-operations per second, and the fraction of the roofline: the larger of
the time that the device needs for the operations at its measured peak and for the bytes at its measured bandwidth,
over the time taken. Candidates: bfloat16 (cuBLAS, cuDNN channels last), torch._int_mm, this package's W8A8, W4A8 (per
channel and groups of 64), W4A16, FP8 on sm_90, each with and without the quantization of its input; torchao and
gemlite where installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import ActivationTable, quantize_by_table, quantize_dynamic
from kernels.conv import ConvGeometry, conv2d_int
from kernels.epilogue import Epilogue
from kernels.fp8 import linear_fp8, quantize_fp8
from kernels.gemm import linear_float, linear_int
from kernels.packing import pack_codes
from kernels.weights import PackedWeight, pack_weight

HALF = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Layer:
    """A Linear (`kernel` 0, `size` rows of one sample) or a Conv2d (images of `size` x `size`)."""

    name: str
    size: int
    channels: int
    outputs: int
    kernel: int = 0

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return max(1, self.kernel**2)


LAYERS = (
    Layer("SDXL resnet 128x128", 128, 320, 320, 3),
    Layer("SDXL resnet 64x64", 64, 640, 640, 3),
    Layer("SDXL resnet 32x32", 32, 1280, 1280, 3),
    Layer("SDXL up resnet 32x32", 32, 2560, 1280, 3),
    Layer("SDXL shortcut 64x64", 64, 960, 640, 1),
    Layer("SDXL attention 64x64", 4096, 640, 640),
    Layer("SDXL attention 32x32", 1024, 1280, 1280),
    Layer("SDXL feed-forward 32x32", 1024, 1280, 10240),
    Layer("DiT-XL attention", 256, 1152, 3456),
    Layer("DiT-XL feed-forward", 256, 1152, 4608),
    Layer("DiT-XL modulation", 1, 1152, 6912),
)


def random_weight(layer: Layer, bits: int, group_size: int | None = None) -> PackedWeight:
    """Make a symmetric weight on the GPU."""
    columns, groups = (
        layer.taps * layer.channels,
        1 if group_size is None else layer.taps * -(-layer.channels // group_size),
    )
    codes = torch.randint(0, 1 << bits, (layer.outputs, columns), dtype=torch.uint8)
    zero = torch.full((layer.outputs, groups), 1 << (bits - 1), dtype=torch.uint8)
    scale = torch.full((layer.outputs, groups), 0.01, dtype=torch.float32 if group_size is None else HALF)
    packed = pack_weight(
        pack_codes(codes, bits), scale, zero, bits=bits, channels=layer.channels, taps=layer.taps, group_size=group_size
    )
    return packed.to("cuda")


def table() -> ActivationTable:
    """Make a static grid on the GPU."""
    return ActivationTable(torch.tensor([0.03], device="cuda"), torch.tensor([120.0], device="cuda"), 8)


def linear_candidates(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Linear is timed as."""
    x = torch.randn(batch * layer.size, layer.channels, device="cuda", dtype=HALF)
    w = torch.randn(layer.outputs, layer.channels, device="cuda", dtype=HALF)
    yield "bfloat16", lambda: F.linear(x, w)
    if x.shape[0] > 16 and layer.channels % 8 == 0:
        left, right = (torch.randint(-128, 128, t.shape, device="cuda", dtype=torch.int8) for t in (x, w))
        yield "torch._int_mm", lambda: torch._int_mm(left, right.t())
    grid, out = table(), Epilogue(HALF)
    codes = quantize_by_table(x, grid)
    for name, bits, group in (("W8A8", 8, None), ("W4A8", 4, None), ("W4A8 g64", 4, 64)):
        weight = [random_weight(layer, bits, group)]
        yield name, lambda weight=weight: linear_int(codes, weight, out)
        yield f"{name} with quantization", lambda weight=weight: linear_int(quantize_by_table(x, grid), weight, out)
    eight = [random_weight(layer, 8)]
    yield (
        "W8A8 with dynamic quantization",
        lambda: linear_int(quantize_dynamic(x, 8, symmetric=True, per_token=True), eight, out),
    )
    for name, group in (("W4A16", None), ("W4A16 g64", 64)):
        four = [random_weight(layer, 4, group)]
        yield name, lambda four=four: linear_float(x, four, out)
    if torch.cuda.get_device_capability() >= (8, 9):
        x8, w8 = quantize_fp8(x), quantize_fp8(w)
        yield "FP8", lambda: linear_fp8(x8, w8, out)
        yield "FP8 with quantization", lambda: linear_fp8(quantize_fp8(x), w8, out)
    yield from other_libraries(layer, x)


def other_libraries(layer: Layer, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield torchao's and gemlite's Linear, where they are installed."""
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = torch.nn.Sequential(torch.nn.Linear(layer.channels, layer.outputs, bias=False)).to("cuda", HALF)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        compiled = torch.compile(model)
        yield "torchao W8A8 dynamic, compiled", lambda: compiled(x)
    if importlib.util.find_spec("gemlite"):
        from gemlite.helper import A16W8, A8W8_int8_dynamic

        for name, make in (("gemlite W8A8 dynamic", A8W8_int8_dynamic), ("gemlite W8A16", A16W8)):
            linear = torch.nn.Linear(layer.channels, layer.outputs, bias=False, device="cuda", dtype=torch.float16)
            module, half = make(device="cuda").from_linear(linear), x.half()
            yield name, lambda module=module, half=half: module(half)


def conv_candidates(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Conv2d is timed as."""
    pad = layer.kernel // 2
    image = torch.randn(batch, layer.channels, layer.size, layer.size, device="cuda", dtype=HALF)
    kernel = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel, device="cuda", dtype=HALF)
    image, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
    yield "bfloat16", lambda: F.conv2d(image, kernel, padding=pad)
    rows, grid, out = image.permute(0, 2, 3, 1), table(), Epilogue(HALF)
    codes, geometry = quantize_by_table(rows, grid), ConvGeometry((layer.kernel, layer.kernel), padding=(pad, pad))
    for name, bits, group in (("W8A8", 8, None), ("W4A8", 4, None), ("W4A8 g64", 4, 64)):
        weight = [random_weight(layer, bits, group)]
        yield name, lambda weight=weight: conv2d_int(codes, weight, geometry, out)
        yield (
            f"{name} with quantization",
            lambda weight=weight: conv2d_int(quantize_by_table(rows, grid), weight, geometry, out),
        )


def microseconds(run: Callable[[], Any], repeats: int, flush: Tensor) -> float:
    """Median time of `run`, with a cold L2 cache."""
    for _ in range(5):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)


def peaks(repeats: int, flush: Tensor) -> dict[str, float]:
    """Measure the device: operations per microsecond of bfloat16 and int8 matrices, bytes per microsecond of a copy."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=HALF) for _ in range(2))
    x, y = (torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "bfloat16": 2 * n**3 / microseconds(lambda: a @ b, repeats, flush),
        "int8": 2 * n**3 / microseconds(lambda: torch._int_mm(x, y.t()), repeats, flush),
        "bytes": 2 * source.numel() / microseconds(lambda: target.copy_(source), repeats, flush),
    }


def roofline(layer: Layer, batch: int, name: str, peak: dict[str, float]) -> float:
    """Least microseconds that the layer can take with this candidate's types, without its quantization."""
    rows = batch * (layer.size**2 if layer.kernel else layer.size)
    weights = layer.outputs * layer.channels * layer.taps
    is_float = name in ("bfloat16", "gemlite W8A16") or name.startswith("W4A16")
    weight_bytes = 0.5 if name.startswith("W4") else 2 if name == "bfloat16" else 1
    moved = rows * layer.channels * (2 if is_float else 1) + weights * weight_bytes + rows * layer.outputs * 2
    return max(2 * rows * weights / peak["bfloat16" if is_float else "int8"], moved / peak["bytes"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("device: got no GPU, wanted one that Triton compiles for")
    import triton

    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    peak = peaks(options.repeats, flush)
    results = []
    for layer in LAYERS:
        rows = options.batch * (layer.size**2 if layer.kernel else layer.size)
        operations = 2 * rows * layer.outputs * layer.channels * layer.taps
        timed = {}
        for name, run in (conv_candidates if layer.kernel else linear_candidates)(layer, options.batch):
            us = microseconds(run, options.repeats, flush)
            least = roofline(layer, options.batch, name, peak)
            timed[name] = {
                "us": round(us, 2),
                "tops": round(operations / us / 1e6, 1),
                "roofline": round(least / us, 3),
            }
        for figures in timed.values():
            figures["speedup"] = round(timed["bfloat16"]["us"] / figures["us"], 3)
        results.append({"layer": layer.name, "candidates": timed})
    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    text = json.dumps({"device": device, "batch": options.batch, "peak_per_us": peak, "layers": results}, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
