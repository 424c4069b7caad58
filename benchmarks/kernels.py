"""The Triton kernels on a GPU, on shapes of SDXL's UNet and of a DiT-XL, against what is there already.

    python -m benchmarks.kernels [--batches 1 8] [--repeats 50] [--only TEXT] [--candidates TEXT] [--minutes M]
        [--out FILE]

Prints one JSON document: for each batch size, layer and candidate the microseconds (median of `--repeats`, each a
replay of a CUDA graph timed by events, so that launches from Python do not count, the L2 cache cleared before each),
tera-operations per second, the speedup over bfloat16, and the fraction of the roofline: the larger of the time that the
device needs for the operations at its measured peak and for the bytes at its measured bandwidth, over the time taken.
Candidates: bfloat16 (cuBLAS, cuDNN channels last), torch._int_mm, this package's W8A8, W4A8 (per channel and groups of
128, packed and unpacked to int8), W4A16, FP8 on sm_90, and those with the quantization of the input; W8A8 with scaled
channels, and channels of 3, 4 and 5 bits; torchao and gemlite where installed. "... behind LAYER" are what comes before
a layer in its model (a norm, an activation) and the layer together: in bfloat16 compiled by torch.compile and then
multiplied, in 8 bits with the quantization in the same kernel; their speedup is over bfloat16's behind the same.
Weights are normal, quantized, as real ones are; "uniform codes" beside it has each code as often as any other, on which
tensor cores draw more power and clock lower. `quantize` has the kernels that make codes, in bytes per microsecond, as a
fraction of what a copy moves. What fails is recorded with its error. --minutes leaves out what is not reached by then.
`figures` has the least, median and greatest speedup over layers: of W8A8 at the largest batch, of W4A16 at the least
where weights dominate.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cli import give, keep, parser
from benchmarks.timing import cuda_ms
from benchmarks.weights import random_weight
from kernels.activations import ActivationTable, QuantizedActivation, quantize_by_table, quantize_dynamic
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cuda_graph import captured
from kernels.epilogue import Epilogue
from kernels.fp8 import linear_fp8, quantize_fp8
from kernels.gates import Gate, gate_quantize, gate_quantize_fp8
from kernels.gemm import linear_float, linear_int
from kernels.norms import GroupNorm, LayerNorm, group_norm_quantize, layer_norm_quantize, layer_norm_quantize_fp8
from kernels.weights import PackedWeight, join_widths, unpack_weight

HALF = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Layer:
    """A Linear (`kernel` 0, `size` rows of one sample) or a Conv2d (images of `size` x `size`).

    `behind` is what its input comes from: "layer norm", "modulated layer norm", a `Gate`; a Conv2d's is group norm and
    SiLU.
    """

    name: str
    size: int
    channels: int
    outputs: int
    kernel: int = 0
    behind: str = ""

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return max(1, self.kernel**2)


# Those that matter most first: a run may be cut.
NORM, MODULATED, SILU = "layer norm", "modulated layer norm", "group norm, SiLU"
LAYERS = (
    Layer("SDXL resnet 64x64", 64, 640, 640, 3, SILU),
    Layer("SDXL feed-forward 32x32", 1024, 1280, 10240, behind=NORM),
    Layer("SDXL attention 64x64", 4096, 640, 640, behind=NORM),
    Layer("DiT-XL feed-forward", 256, 1152, 4608, behind=MODULATED),
    Layer("SDXL attention 32x32", 1024, 1280, 1280, behind=NORM),
    Layer("SDXL shortcut 64x64", 64, 960, 640, 1),
    Layer("DiT-XL attention", 256, 1152, 3456, behind=MODULATED),
    Layer("SDXL out of feed-forward 32x32", 1024, 5120, 1280, behind=Gate.GEGLU),
    Layer("DiT-XL out of feed-forward", 256, 4608, 1152, behind=Gate.GELU_TANH),
    Layer("SD3 feed-forward", 4096, 1536, 6144, behind=MODULATED),
    Layer("SD3 out of feed-forward", 4096, 6144, 1536, behind=Gate.GELU_TANH),
    Layer("Flux attention", 4608, 3072, 9216, behind=MODULATED),
    Layer("SDXL resnet 32x32", 32, 1280, 1280, 3, SILU),
    Layer("SDXL up resnet 32x32", 32, 2560, 1280, 3, SILU),
    Layer("SDXL resnet 128x128", 128, 320, 320, 3, SILU),
    Layer("SDXL cross-attention keys", 77, 2048, 1280),
    Layer("SDXL time embedding", 1, 1280, 1280),
    Layer("DiT-XL modulation", 1, 1152, 6912),
)
# Layers of few rows at batch 1: reading weights is what takes time.
FEW_ROWS = 80


def layer_weight(
    layer: Layer,
    bits: int,
    group_size: int | None = None,
    channel: Tensor | None = None,
    *,
    uniform: bool = False,
    multiplied: bool = False,
) -> PackedWeight:
    """Make a symmetric weight on the GPU, of all output channels or of those that `channel` names."""
    sizes = (layer.outputs, layer.channels, layer.taps, bits, group_size, channel)
    return random_weight(*sizes, uniform=uniform, multiplied=multiplied, device="cuda")


def mixed_weight(layer: Layer) -> list[PackedWeight]:
    """Make a weight whose output channels have 3, 4 or 5 bits, a third each; as a model's layer has it."""
    order = torch.randperm(layer.outputs, generator=torch.Generator().manual_seed(0))
    shares = zip((3, 4, 5), order.chunk(3), strict=True)
    return list(join_widths([layer_weight(layer, bits, None, part) for bits, part in shares]))


def weights_of(layer: Layer) -> Iterator[tuple[str, Sequence[PackedWeight]]]:
    """Yield the weights of one width that a layer is timed with."""
    yield "W8A8", [layer_weight(layer, 8)]
    sizes = (layer.outputs, layer.channels, layer.taps, 8)
    yield "W8A8, zero points", [random_weight(*sizes, uniform=False, zero_points=True, device="cuda")]
    for name, group in (("W4A8", None), ("W4A8 g128", 128), ("W4A8 g64 of integers", 64)):
        packed = [layer_weight(layer, 4, group, multiplied=group == 64)]
        yield f"{name} packed", packed
        yield f"{name}, unpacked", unpack_weight(packed)


def table(channels: int = 0) -> ActivationTable:
    """Make a static grid on the GPU, with divisors of that many channels if there are any."""
    divisor = torch.full((1, channels), 0.03, device="cuda") if channels else None
    return ActivationTable(
        torch.tensor([0.03], device="cuda"), torch.tensor([120.0], device="cuda"), 8, divisor=divisor
    )


def uniform_codes(x: Tensor) -> QuantizedActivation:
    """Return codes of the shape of `x`, each as often as any other."""
    codes = torch.randint(-128, 128, x.shape, device="cuda", dtype=torch.int8)
    scale, zero = (torch.tensor([value], device="cuda") for value in (0.03, 3))
    return QuantizedActivation(codes, scale, zero.int(), symmetric=False)


def _quantized(operator: Callable[..., Tensor], x: Tensor, grid: ActivationTable, *rest: Any) -> Tensor:
    """Quantize the input of an integer operator, and call it."""
    return operator(quantize_by_table(x, grid), *rest)


def linear_candidates(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Linear is timed as."""
    x = torch.randn(batch * layer.size, layer.channels, device="cuda", dtype=HALF)
    w = torch.randn(layer.outputs, layer.channels, device="cuda", dtype=HALF)
    yield "bfloat16", lambda: F.linear(x, w)
    grid, out = table(), Epilogue(HALF)
    codes, flat = quantize_by_table(x, grid), uniform_codes(x)
    if x.shape[0] > 16 and layer.channels % 8 == 0:
        right = quantize_by_table(w, grid).codes
        yield "torch._int_mm", lambda: torch._int_mm(codes.codes, right.t())
        even, odd = flat.codes, uniform_codes(w).codes
        yield "torch._int_mm, uniform codes", lambda: torch._int_mm(even, odd.t())
    yield "W8A8, uniform codes", partial(linear_int, flat, [layer_weight(layer, 8, uniform=True)], out)
    for name, weight in weights_of(layer):
        yield name, partial(linear_int, codes, weight, out)
        yield f"{name} with quantization", partial(_quantized, linear_int, x, grid, weight, out)
    mixed, eight, scaled = mixed_weight(layer), [layer_weight(layer, 8)], table(layer.channels)
    yield "W3/4/5A8", lambda: linear_int(codes, mixed, out)
    unpacked = unpack_weight(mixed)
    yield "W3/4/5A8, unpacked", lambda: linear_int(codes, unpacked, out)
    yield "W8A8 with quantization of scaled channels", lambda: linear_int(quantize_by_table(x, scaled), eight, out)
    yield (
        "W8A8 with dynamic quantization",
        lambda: linear_int(quantize_dynamic(x, 8, symmetric=True, per_token=True), eight, out),
    )
    for name, group in (("W4A16", None), ("W4A16 g64", 64)):
        four = [layer_weight(layer, 4, group)]
        yield name, partial(linear_float, x, four, out)
    if torch.cuda.get_device_capability() >= (8, 9):
        x8, w8 = quantize_fp8(x), quantize_fp8(w)
        yield "FP8", lambda: linear_fp8(x8, w8, out)
        yield "FP8 with quantization", lambda: linear_fp8(quantize_fp8(x), w8, out)


def linear_behind(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Linear is timed as together with what its input comes from."""
    is_gate = layer.behind in set(Gate)
    width = layer.channels * (Gate(layer.behind).inputs if is_gate else 1)
    x = torch.randn(batch, layer.size, width, device="cuda", dtype=HALF)
    w = torch.randn(layer.outputs, layer.channels, device="cuda", dtype=HALF)
    weight = torch.ones(width, device="cuda", dtype=HALF)
    bias, (by, add) = torch.zeros_like(weight), torch.randn(2, batch, width, device="cuda", dtype=HALF)

    def before(x: Tensor) -> Tensor:
        if layer.behind == Gate.GEGLU:
            value, gating = x.chunk(2, dim=-1)
            return value * F.gelu(gating)
        if is_gate:
            return F.gelu(x, approximate="tanh")
        if layer.behind == NORM:
            return F.layer_norm(x, (width,), weight, bias)
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + by[:, None]) + add[:, None]

    compiled = torch.compile(before, dynamic=False)
    yield f"bfloat16 behind {layer.behind}", lambda: F.linear(compiled(x), w)
    out, grid, eight = Epilogue(HALF), table(), [layer_weight(layer, 8)]
    norm = LayerNorm(1e-5, weight, bias) if layer.behind == NORM else LayerNorm(1e-6, multiplier=by, shift=add)
    w8 = quantize_fp8(w)
    if is_gate:
        yield f"W8A8 behind {layer.behind}", lambda: linear_int(gate_quantize(x, Gate(layer.behind), grid), eight, out)
        yield f"FP8 behind {layer.behind}", lambda: linear_fp8(gate_quantize_fp8(x, Gate(layer.behind)), w8, out)
        return
    yield f"W8A8 behind {layer.behind}", lambda: linear_int(layer_norm_quantize(x, norm, grid), eight, out)
    yield f"FP8 behind {layer.behind}", lambda: linear_fp8(layer_norm_quantize_fp8(x, norm), w8, out)


def conv_behind(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Conv2d is timed as together with the group norm and SiLU in front of it."""
    image = torch.randn(batch, layer.channels, layer.size, layer.size, device="cuda", dtype=HALF)
    kernel = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel, device="cuda", dtype=HALF)
    image, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
    weight, bias = (torch.randn(layer.channels, device="cuda", dtype=HALF) for _ in range(2))
    compiled = torch.compile(lambda x: F.silu(F.group_norm(x, 32, weight, bias)), dynamic=False)
    pad = layer.kernel // 2
    yield f"bfloat16 behind {layer.behind}", lambda: F.conv2d(compiled(image), kernel, padding=pad)
    rows, out, grid, eight = image.permute(0, 2, 3, 1), Epilogue(HALF), table(), [layer_weight(layer, 8)]
    norm, geometry = GroupNorm(32, 1e-5, weight, bias), ConvGeometry((layer.kernel,) * 2, padding=(pad, pad))
    yield (
        f"W8A8 behind {layer.behind}",
        lambda: conv2d_int(group_norm_quantize(rows, norm, grid), eight, geometry, out),
    )


def other_libraries(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """Yield what builds torchao's and gemlite's Linear, where they are installed."""
    x = torch.randn(batch * layer.size, layer.channels, device="cuda", dtype=HALF)
    if importlib.util.find_spec("torchao"):
        yield "torchao W8A8 dynamic, compiled", lambda: torchao_linear(layer, x, 8)
        yield "torchao W4A16 g64, compiled", lambda: torchao_linear(layer, x, 4)
    if importlib.util.find_spec("gemlite"):
        yield "gemlite W8A8 dynamic", lambda: gemlite_linear(layer, x, "A8W8_int8_dynamic")
        yield "gemlite W8A16", lambda: gemlite_linear(layer, x, "A16W8")
        yield "gemlite W4A16 g64", lambda: gemlite_linear(layer, x, "A16Wn")


def torchao_linear(layer: Layer, x: Tensor, bits: int) -> Callable[[], Any]:
    """Return a call of torchao's Linear, compiled, which is how it is meant to be used."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=64)
    model = torch.nn.Sequential(torch.nn.Linear(layer.channels, layer.outputs, bias=False)).to("cuda", HALF)
    quantize_(model, config)
    compiled = torch.compile(model)
    return lambda: compiled(x)


def gemlite_linear(layer: Layer, x: Tensor, processor: str) -> Callable[[], Any]:
    """Return a call of gemlite's Linear, in float16."""
    from gemlite import helper

    make, half = getattr(helper, processor)(device="cuda"), x.half()
    if processor == "A16Wn":
        codes = torch.randint(0, 16, (layer.outputs, layer.channels), device="cuda", dtype=torch.uint8)
        groups = (layer.outputs * layer.channels // 64, 1)
        scale, zero = (torch.full(groups, value, device="cuda", dtype=torch.float16) for value in (0.01, 8.0))
        module = make.from_weights(codes, scale, zero, 4, 64, None)
    else:
        linear = torch.nn.Linear(layer.channels, layer.outputs, bias=False, device="cuda", dtype=torch.float16)
        module = make.from_linear(linear)
    return lambda: module(half)


def conv_candidates(layer: Layer, batch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what a Conv2d is timed as."""
    pad = layer.kernel // 2
    image = torch.randn(batch, layer.channels, layer.size, layer.size, device="cuda", dtype=HALF)
    kernel = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel, device="cuda", dtype=HALF)
    image, kernel = (t.contiguous(memory_format=torch.channels_last) for t in (image, kernel))
    yield "bfloat16", lambda: F.conv2d(image, kernel, padding=pad)
    rows, grid, out = image.permute(0, 2, 3, 1), table(), Epilogue(HALF)
    codes, geometry = quantize_by_table(rows, grid), ConvGeometry((layer.kernel, layer.kernel), padding=(pad, pad))
    even = [layer_weight(layer, 8, uniform=True)]
    yield "W8A8, uniform codes", partial(conv2d_int, uniform_codes(rows), even, geometry, out)
    for name, weight in weights_of(layer):
        yield name, partial(conv2d_int, codes, weight, geometry, out)
        yield f"{name} with quantization", partial(_quantized, conv2d_int, rows, grid, weight, geometry, out)
    mixed = mixed_weight(layer)
    yield "W3/4/5A8", lambda: conv2d_int(codes, mixed, geometry, out)
    unpacked = unpack_weight(mixed)
    yield "W3/4/5A8, unpacked", lambda: conv2d_int(codes, unpacked, geometry, out)


def quantize_candidates() -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Yield what makes codes: its name, the bytes that it has to read and write, its call."""
    for rows, channels in ((32768, 640), (8192, 1280), (8192, 5120), (2048, 1152)):
        x = torch.randn(rows, channels, device="cuda", dtype=HALF)
        moved, size = 3 * x.numel(), f"{rows}x{channels}"
        grid, scaled = table(), table(channels)
        yield f"by table {size}", moved, partial(quantize_by_table, x, grid)
        yield f"by table, scaled channels {size}", moved, partial(quantize_by_table, x, scaled)
        yield f"tokens {size}", moved, partial(quantize_dynamic, x, 8, symmetric=True, per_token=True)
        if torch.cuda.get_device_capability() >= (8, 9):
            yield f"FP8 tokens {size}", moved, partial(quantize_fp8, x)
        tokens = x.view(8, -1, channels)
        shift, scale = (torch.randn(8, channels, device="cuda", dtype=HALF) for _ in range(2))
        modulated = partial(layer_norm_quantize, tokens, LayerNorm(1e-6, multiplier=scale, shift=shift), 8)
        yield f"layer norm, modulated, tokens {size}", moved, modulated
    for batch, side, channels in ((8, 128, 320), (8, 64, 640), (8, 32, 1280)):
        image = torch.randn(batch, side, side, channels, device="cuda", dtype=HALF)
        weight, bias = (torch.randn(channels, device="cuda", dtype=HALF) for _ in range(2))
        grid, moved = table(), 5 * image.numel()  # read for its statistics, and again
        norm = partial(group_norm_quantize, image, GroupNorm(32, 1e-5, weight, bias), grid)
        yield f"group norm, SiLU {batch}x{side}x{side}x{channels}", moved, norm


def quantize_times(repeats: int, peak: dict[str, float], flush: Tensor) -> dict[str, Any]:
    """Time what makes codes."""
    found: dict[str, Any] = {}
    for name, moved, run in quantize_candidates():
        try:
            us = microseconds(run, repeats, flush)
            found[name] = {"us": round(us, 2), "of_copy": round(moved / us / peak["bytes"], 3)}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def microseconds(run: Callable[[], Any], repeats: int, flush: Tensor) -> float:
    """Median time of `run`, replayed from a CUDA graph with a cold L2 cache.

    Clearing the cache keeps the device busy while the host enqueues the replay, so the host's time does not count.
    """
    replay = captured(run)

    def cold_us() -> float:
        flush.zero_()
        return 1000 * cuda_ms(replay)

    return statistics.median(cold_us() for _ in range(repeats))


def peaks(repeats: int, flush: Tensor) -> dict[str, float]:
    """Measure the device: operations per microsecond of bfloat16 and int8 matrices, bytes per microsecond of a copy."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=HALF) for _ in range(2))
    x, y = (torch.randint(-128, 128, (n, n), device="cuda", dtype=torch.int8) for _ in range(2))
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "bfloat16": 2 * n**3 / microseconds(lambda: a @ b, repeats, flush),
        "int8": 2 * n**3 / microseconds(lambda: torch._int_mm(x, y.t()), repeats, flush),
        # By an elementwise kernel: what a copy node of a graph moves depends on how the driver copies.
        "bytes": 8 * source.numel() / microseconds(lambda: torch.neg(source, out=target), repeats, flush),
    }


def roofline(layer: Layer, batch: int, name: str, peak: dict[str, float]) -> float:
    """Least microseconds that the layer can take with this candidate's types, without its quantization."""
    rows = batch * (layer.size**2 if layer.kernel else layer.size)
    weights = layer.outputs * layer.channels * layer.taps
    is_float = name == "bfloat16" or "A16" in name
    weight_bytes = 0.5 if "W4" in name or "W3/4/5" in name else 2 if name == "bfloat16" else 1
    moved = rows * layer.channels * (2 if is_float else 1) + weights * weight_bytes + rows * layer.outputs * 2
    return max(2 * rows * weights / peak["bfloat16" if is_float else "int8"], moved / peak["bytes"])


def measure(
    layer: Layer, batch: int, repeats: int, peak: dict[str, float], flush: Tensor, wanted: str
) -> dict[str, Any]:
    """Time every candidate of a layer whose name holds what is `wanted`, and bfloat16."""
    rows = batch * (layer.size**2 if layer.kernel else layer.size)
    operations = 2 * rows * layer.outputs * layer.channels * layer.taps
    timed: dict[str, Any] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        us = microseconds(run, repeats, flush)
        timed[name] = {
            "us": round(us, 2),
            "tops": round(operations / us / 1e6, 1),
            "roofline": round(roofline(layer, batch, name, peak) / us, 3),
        }
        over = f"bfloat16 behind {layer.behind}" if name.endswith(f" behind {layer.behind}") else "bfloat16"
        timed[name]["speedup"] = round(timed[over]["us"] / us, 3)

    stream = torch.cuda.current_stream()

    def attempt(name: str, build: Callable[[], Callable[[], Any]]) -> None:
        if wanted not in name and not name.startswith("bfloat16"):
            return
        try:
            note(name, build())
        except Exception as error:  # what one candidate cannot do leaves the others' times
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own
            timed[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}

    yielding = [conv_candidates if layer.kernel else linear_candidates]
    if layer.behind:
        yielding.append(conv_behind if layer.kernel else linear_behind)
    for candidates in yielding:
        for name, run in candidates(layer, batch):
            attempt(name, lambda run=run: run)  # type: ignore[misc]
    for name, build in () if layer.kernel else other_libraries(layer, batch):
        attempt(name, build)
    return timed


def figures(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the speedups over bfloat16 that are aimed at: W8A8 at the largest batch, W4A16 where weights dominate."""
    few = {layer.name for layer in LAYERS if not layer.kernel and layer.size <= FEW_ROWS}
    large, small = (results[str(pick(map(int, results)))] for pick in (max, min))
    many = [timed for name, timed in large.items() if name not in few]
    chosen = {
        f"{name}, largest batch": [timed[name] for timed in many if name in timed]
        for name in ("W8A8", "W8A8 with quantization")
    }
    chosen["W4A16, least batch"] = [timed["W4A16"] for name, timed in small.items() if name in few and "W4A16" in timed]
    for name in ("W8A8", "FP8"):
        behind = [
            (key, each) for timed in large.values() for key, each in timed.items() if key.startswith(f"{name} behind ")
        ]
        chosen[f"{name} behind norms and gates"] = [each for key, each in behind if not key.endswith(SILU)]
        chosen[f"{name} behind {SILU}"] = [each for key, each in behind if key.endswith(SILU)]
    found = {name: sorted(each["speedup"] for each in timed if "us" in each) for name, timed in chosen.items()}
    return {
        name: {"least": all_[0], "median": statistics.median(all_), "greatest": all_[-1]}
        for name, all_ in found.items()
        if all_
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    command.add_argument("--repeats", type=int, default=50)
    command.add_argument("--only", default="", help="layers whose name contains this")
    command.add_argument("--candidates", default="", help="only those whose name contains this")
    command.add_argument("--minutes", type=float, default=60.0, help="stop before a layer that starts later than this")
    command.add_argument("--out", type=Path)
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    import triton

    end = time.monotonic() + 60 * options.minutes
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    peak = peaks(options.repeats, flush)
    layers = [layer for layer in LAYERS if options.only in layer.name]
    results: dict[str, dict[str, Any]] = {}
    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"device": device, "peak_per_us": peak, "batches": results}
    found["quantize"] = quantize_times(options.repeats, peak, flush)
    for batch in options.batches:
        results[str(batch)] = {}
        for layer in layers:
            if time.monotonic() > end:
                break
            results[str(batch)][layer.name] = measure(layer, batch, options.repeats, peak, flush, options.candidates)
            print(f"batch {batch}, {layer.name}: done", file=sys.stderr)
            if options.out:  # so that a device that fails later does not take it along
                keep(found, options.out)
    give(found | {"figures": figures(results)}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
