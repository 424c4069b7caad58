"""Time tiles of the 8-bit kernels on this GPU, for the layers of SD 1.5, SDXL, DiT-XL, SD3 and Flux.

    python -m benchmarks.tune [--minutes 6] [--workers 12] [--only TEXT] [--ops OP ...] [--out FILE] [--install]

First every tile is compiled and checked, in processes of their own: each multiplies a small problem with tails, zero
points and bias, and what is not the reference's is left out, as is what does not end. Then each layer is
timed with today's choice, in bfloat16 (cuBLAS, cuDNN) and with each tile that passed, from a CUDA graph with a cold L2
cache, on codes of quantized normal data. Prints one JSON document with all times, and a table of before and after;
`entries` in it are what `kernels/_triton/tuned/<device>.json` holds, which `--install` writes. A shape's entry is the
fastest tile, unless today's choice is within 2 %. Shapes come in order of importance; those that the minutes do not
reach are left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cli import give, keep, parser
from benchmarks.timing import cuda_ms
from benchmarks.weights import random_weight
from kernels._triton.conv import launch_conv2d_int
from kernels._triton.fp8 import launch_linear_fp8
from kernels._triton.gemm import launch_linear_int
from kernels._triton.hopper_launch import largest_power
from kernels._triton.tuned import (
    CONV_GROUPS,
    CONV_INT8,
    CONV_PACKED,
    HOPPER,
    LINEAR_FP8,
    LINEAR_GROUPS,
    LINEAR_INT8,
    LINEAR_PACKED,
    POINTERS,
    Entry,
    Shape,
    Tile,
    chip_of,
    document,
    file_of,
    row_of,
)
from kernels.activations import ActivationTable, quantize_by_table
from kernels.conv import ConvGeometry, conv2d_int_reference
from kernels.cuda_graph import captured
from kernels.epilogue import EpilogueRows
from kernels.fp8 import Fp8Matrix, linear_fp8_reference, quantize_fp8
from kernels.gemm import linear_int_reference
from kernels.weights import PackedWeight, unpack_weight

HALF = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where only what needs no GPU is called
#: What a tile must gain over today's choice to be kept.
GAIN = 1.02
#: Of the minutes, what compiling and checking may take.
CHECK_SHARE = 0.6
#: Sides of the images that tiles are checked on, most important first.
SIDES = (64, 32, 128, 16)
#: Channels that share a scale, of the weights with groups.
GROUP = 128
GROUPED = (LINEAR_GROUPS, CONV_GROUPS)
#: Channels that share a multiplier, of packed weights.
PACKED_GROUP = 64
PACKED = (LINEAR_PACKED, CONV_PACKED)
OPS = (LINEAR_INT8, CONV_INT8, LINEAR_FP8, *PACKED, *GROUPED)
#: Operators that only Hopper's own loop has tiles for.
OF_HOPPER = (*PACKED, *GROUPED)
REPEATS = 9
#: Relative to a value rounded to bfloat16: half a step of its 8 bits, twice, for additions in another order.
TOLERANCE = 2.0**-7
#: Rounding to bfloat16 is 0.002, and FP8's running sums add less than that.
FP8_DISTANCE = 0.01


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer at a typical batch: rows of a Linear, or (batch, side) of a square image for a 3x3 convolution."""

    name: str
    k: int
    n: int
    rows: int = 0
    image: tuple[int, int] | None = None

    @property
    def shape(self) -> Shape:
        """The product that it is."""
        if self.image is None:
            return Shape(self.rows, self.n, self.k)
        return Shape(self.image[0] * self.image[1] ** 2, self.n, self.k, 9)

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        shape = self.shape
        return 2.0 * shape.m * shape.n * shape.k * shape.taps


LAYERS = (
    Layer("SDXL resnet 64x64, batch 8", 640, 640, image=(8, 64)),
    Layer("SDXL feed-forward 32x32, batch 8", 1280, 10240, 8192),
    Layer("SDXL attention 64x64, batch 8", 640, 640, 32768),
    Layer("DiT-XL feed-forward, batch 8", 1152, 4608, 2048),
    Layer("SDXL resnet 32x32, batch 8", 1280, 1280, image=(8, 32)),
    Layer("SDXL attention 32x32, batch 8", 1280, 1280, 8192),
    Layer("Flux feed-forward, batch 1", 3072, 12288, 4608),
    Layer("SDXL up resnet 32x32, batch 8", 2560, 1280, image=(8, 32)),
    Layer("SDXL resnet 128x128, batch 8", 320, 320, image=(8, 128)),
    Layer("DiT-XL attention, batch 8", 1152, 3456, 2048),
    Layer("SD3 feed-forward, batch 4", 1536, 6144, 16384),
    Layer("Flux out of feed-forward, batch 1", 15360, 3072, 4608),
    Layer("SDXL out of feed-forward 32x32, batch 8", 5120, 1280, 8192),
    Layer("SD1.5 resnet 64x64, batch 8", 320, 320, image=(8, 64)),
    Layer("SD1.5 resnet 16x16, batch 8", 1280, 1280, image=(8, 16)),
    Layer("SD1.5 attention 64x64, batch 8", 320, 320, 32768),
    Layer("SDXL feed-forward 64x64, batch 8", 640, 5120, 32768),
    Layer("SD3 attention, batch 4", 1536, 1536, 16384),
    Layer("Flux attention, batch 1", 3072, 9216, 4608),
    Layer("DiT-XL out of feed-forward, batch 8", 4608, 1152, 2048),
    Layer("SDXL resnet 64x64, batch 1", 640, 640, image=(1, 64)),
    Layer("DiT-XL of 512, attention, batch 4", 1152, 3456, 4096),
    Layer("DiT-XL of 512, out of attention, batch 4", 1152, 1152, 4096),
    Layer("DiT-XL of 512, feed-forward, batch 4", 1152, 4608, 4096),
    Layer("DiT-XL of 512, out of feed-forward, batch 4", 4608, 1152, 4096),
    Layer("DiT-XL attention, batch 4", 1152, 3456, 1024),
    Layer("DiT-XL out of attention, batch 4", 1152, 1152, 1024),
    Layer("DiT-XL feed-forward, batch 4", 1152, 4608, 1024),
    Layer("DiT-XL out of feed-forward, batch 4", 4608, 1152, 1024),
    Layer("SDXL out of attention 32x32, batch 4", 1280, 1280, 4096),
    Layer("SDXL attention 32x32, batch 4", 1280, 3840, 4096),
    Layer("SDXL feed-forward 32x32, batch 4", 1280, 10240, 4096),
    Layer("SDXL out of feed-forward 32x32, batch 4", 5120, 1280, 4096),
    Layer("SDXL attention 64x64, batch 4", 640, 1920, 16384),
    Layer("SDXL out of attention 64x64, batch 4", 640, 640, 16384),
    Layer("SDXL out of feed-forward 64x64, batch 4", 2560, 640, 16384),
    Layer("SDXL resnet 128x128, batch 4", 320, 320, image=(4, 128)),
    Layer("SDXL resnet 64x64, batch 4", 640, 640, image=(4, 64)),
    Layer("SDXL resnet 32x32, batch 4", 1280, 1280, image=(4, 32)),
    Layer("SD3 out of feed-forward, batch 4", 6144, 1536, 16384),
    Layer("SDXL attention 32x32, batch 1", 1280, 1280, 1024),
    Layer("SDXL feed-forward 32x32, batch 1", 1280, 10240, 1024),
    Layer("DiT-XL attention, batch 1", 1152, 3456, 256),
    Layer("SD1.5 resnet 8x8, batch 8", 1280, 1280, image=(8, 8)),
    Layer("SDXL keys of text, batch 8", 2048, 1280, 616),
)


def tiles(op: str, capability: tuple[int, int]) -> list[Tile]:
    """Return the tiles that are tried for an operator."""
    pointers = [
        Tile(POINTERS, m, n, k, warps, stages)
        for m, n, k, warps, stages in (
            *((128, 128, 128, 8, 3), (128, 128, 128, 4, 3), (128, 256, 128, 8, 3), (128, 128, 64, 4, 4)),
            *((64, 128, 128, 4, 3), (128, 64, 128, 4, 3)),
        )
    ]
    hopper = [
        Tile(HOPPER, m, n, k, warps, stages, halves=halves, per_processor=programs)
        for m, n, k, warps, stages, halves, programs in (
            *((128, 128, 128, 4, 3, 2, 2), (128, 256, 128, 8, 3, 1, 1), (256, 128, 128, 8, 3, 1, 1)),
            *((128, 128, 128, 8, 4, 1, 1), (128, 128, 64, 4, 4, 1, 2), (256, 128, 128, 8, 4, 2, 1)),
            *((128, 64, 128, 4, 4, 1, 2), (64, 256, 128, 4, 3, 1, 1), (64, 128, 128, 4, 4, 1, 2)),
            # A tail of 32 or 64 columns: what divides 320, 640 and 1280, and 1152.
            *((128, 160, 64, 4, 4, 2, 2), (256, 160, 128, 8, 3, 2, 1), (256, 160, 64, 8, 5, 2, 1)),
            *((128, 192, 128, 8, 3, 2, 1), (64, 160, 128, 4, 4, 2, 1), (128, 288, 128, 8, 3, 2, 1)),
            (128, 320, 64, 8, 5, 2, 1),
        )
    ]
    if op in (LINEAR_GROUPS, CONV_GROUPS):
        # An int32 and a float32 sum beside each other: half the tile, and programs that take turns.
        return [
            Tile(HOPPER, m, n, GROUP, warps, stages, per_processor=programs)
            for m, n, warps, stages, programs in (
                *((64, 128, 4, 2, 3), (64, 128, 4, 3, 2), (128, 64, 4, 2, 3), (128, 128, 8, 3, 1)),
                *((128, 64, 4, 3, 2), (256, 64, 8, 3, 1)),
            )
        ]
    if op in PACKED:
        return [
            Tile(HOPPER, m, n, 128, warps, stages, halves=halves, per_processor=programs)
            for m, n, warps, stages, halves, programs in (
                *((128, 128, 4, 3, 2, 2), (256, 128, 8, 3, 1, 1), (128, 64, 4, 4, 1, 2), (64, 128, 4, 4, 2, 2)),
                # A tail of 32 or 64 rows.
                *((160, 128, 4, 3, 2, 2), (192, 128, 8, 3, 1, 1)),
            )
            if op == LINEAR_PACKED or m == largest_power(m)
        ]
    if op == CONV_INT8:
        # A rectangle of pixels is another kernel for each size of image, so that fewer are tried.
        pointers = pointers[:4]
        hopper = [
            *hopper[:6], Tile(HOPPER, 128, 64, 64, 4, 6, per_processor=2), Tile(HOPPER, 256, 64, 64, 8, 6),
            *(tile for tile in hopper[6:] if tile.n == 160 and tile.m > 64),
        ]  # fmt: skip
    return (hopper if capability[0] == 9 else []) + pointers


Run = Callable[[Tile | None], Tensor]


def problem(op: str, shape: Shape, image: tuple[int, int] | None) -> tuple[Run, Callable[[], Tensor]]:
    """Return an operator on data of a shape, to be run with a tile, and the same layer in bfloat16.

    Weights with scales of groups have 4 bits; with a tile they are unpacked, without one packed. Packed weights without
    a tile run Triton's own pipeline, whatever a table says: it may be one that was only predicted.
    """
    usual = Tile(POINTERS, 128, 128, 128, 8, 4) if op in PACKED else None
    out = EpilogueRows(torch.zeros(shape.n, device=DEVICE, dtype=HALF), None, None, None)
    if op == LINEAR_FP8:
        x, w = (torch.randn(size, shape.k, device=DEVICE, dtype=HALF) for size in (shape.m, shape.n))
        left, right = quantize_fp8(x), quantize_fp8(w)
        return lambda tile: launch_linear_fp8(left, right, out, HALF, tile), lambda: F.linear(x, w)
    packed, fast = weights_of(op, shape.n, shape.k, shape.taps)
    grid = ActivationTable(torch.tensor([0.03], device=DEVICE), torch.tensor([120.0], device=DEVICE), 8)
    if image is None:
        x = torch.randn(shape.m, shape.k, device=DEVICE, dtype=HALF)
        w = torch.randn(shape.n, shape.k, device=DEVICE, dtype=HALF)
        codes = quantize_by_table(x, grid)

        def multiply(tile: Tile | None) -> Tensor:
            return launch_linear_int(codes, packed if tile is None else fast, out, shape.n, HALF, tile or usual)

        return multiply, lambda: F.linear(x, w)
    batch, side = image
    x = torch.randn(batch, side, side, shape.k, device=DEVICE, dtype=HALF)
    kernel = torch.randn(shape.n, shape.k, 3, 3, device=DEVICE, dtype=HALF).to(memory_format=torch.channels_last)
    codes, nchw, geometry = quantize_by_table(x, grid), x.permute(0, 3, 1, 2), ConvGeometry((3, 3), padding=(1, 1))

    def convolve(tile: Tile | None) -> Tensor:
        return launch_conv2d_int(codes, packed if tile is None else fast, geometry, out, shape.n, HALF, tile or usual)

    return convolve, lambda: F.conv2d(nchw, kernel, padding=1)


def weights_of(op: str, n: int, k: int, taps: int) -> tuple[Sequence[PackedWeight], Sequence[PackedWeight]]:
    """Return a weight as it is packed, and as it is multiplied with a tile."""
    if op in (LINEAR_INT8, CONV_INT8):
        packed = [random_weight(n, k, taps, 8, uniform=False, device=DEVICE)]
        return packed, packed
    if op in PACKED:
        packed = [random_weight(n, k, taps, 4, PACKED_GROUP, uniform=False, multiplied=True, device=DEVICE)]
        return packed, packed
    packed = [random_weight(n, k, taps, 4, GROUP, uniform=False, device=DEVICE)]
    return packed, unpack_weight(packed)


def check(op: str, tile: Tile, side: int) -> str:
    """Multiply a small problem with tails, of images of `side` if it convolves; say what is wrong with the result.

    Sizes are multiples of 16 as those of real layers are, so that the same kernels are compiled.
    """
    torch.manual_seed(0)
    m, n, k = 1008, 400, 336
    rows = EpilogueRows(torch.randn(n, device=DEVICE, dtype=HALF), None, None, None)
    if op == LINEAR_FP8:
        left, right = (quantize_fp8(torch.randn(size, k, device=DEVICE)) for size in (m, n))
        got = launch_linear_fp8(left, right, rows, HALF, tile)
        return distance(got, linear_fp8_reference(Fp8Matrix(left.values, left.scale), right, rows, torch.float32))
    weight = weights_of(op, n, k, 9 if side else 1)[1]
    shape = (2, side, side, k) if side else (m, k)
    grid = ActivationTable(torch.tensor([0.03, 0.02], device=DEVICE), torch.tensor([120.0, 3.0], device=DEVICE), 8)
    x = quantize_by_table(torch.randn(*shape, device=DEVICE), grid, torch.tensor([0, 1], device=DEVICE))
    if side:
        geometry = ConvGeometry((3, 3), padding=(1, 1))
        got = launch_conv2d_int(x, weight, geometry, rows, n, HALF, tile)
        return difference(got, conv2d_int_reference(x, weight, geometry, rows, n))
    got = launch_linear_int(x, weight, rows, n, HALF, tile)
    return difference(got, linear_int_reference(x.codes, x.scale, x.zero_point, weight, rows, n))


def distance(got: Tensor, want: Tensor) -> str:
    """Say how far a sum of FP8 products is from the one wanted, in all, if that is too far."""
    far = float((got.float() - want.float()).norm() / want.float().norm())
    return "" if far <= FP8_DISTANCE else f"got a relative distance of {far:.2g}, wanted at most {FP8_DISTANCE}"


def difference(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> str:
    """Say how far values of exact sums are from those wanted, at worst, if that is too far."""
    far = (got.float() - want.view(got.shape)).abs() / (want.view(got.shape).abs() + 1e-2)
    worst = float(far.nan_to_num(float("inf")).max())
    return "" if worst <= tolerance else f"got a relative difference of {worst:.2g}, wanted at most {tolerance:.2g}"


@dataclass(frozen=True, slots=True)
class Trial:
    """A tile to check for an operator; `side` of the images that it convolves, 0 of a Linear."""

    op: str
    tile: Tile
    side: int = 0


def trials(capability: tuple[int, int], wanted: Sequence[str] = OPS) -> list[Trial]:
    """Return what is checked of the operators that are wanted, the first tiles of every operator first."""
    ops = (
        LINEAR_INT8,
        CONV_INT8,
        *((LINEAR_FP8,) if capability >= (8, 9) else ()),
        *(OF_HOPPER if capability[0] == 9 else ()),
    )
    found = [
        (place, Trial(op, tile, side))
        for op in ops
        if op in wanted
        for place, tile in enumerate(tiles(op, capability))
        for side in (SIDES if op in (CONV_INT8, CONV_PACKED, CONV_GROUPS) else (0,))
        if tile.kernel == HOPPER or side in (0, SIDES[0])
    ]
    return [trial for _, trial in sorted(found, key=lambda pair: pair[0])]


def check_share(part: int, parts: int, path: Path, wanted: Sequence[str] = OPS) -> None:
    """Check each `parts`th trial, writing a line before and one after, so that one that does not end is known."""
    with path.open("a", encoding="utf-8", buffering=1) as lines:
        for trial in trials(torch.cuda.get_device_capability(), wanted)[part::parts]:
            lines.write(json.dumps(asdict(trial)) + "\n")
            started = time.monotonic()
            try:
                wrong = check(trial.op, trial.tile, trial.side)
            except Exception as error:  # a tile that the compiler or the device refuses is left out
                wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"
            seconds = round(time.monotonic() - started, 1)
            lines.write(json.dumps(asdict(trial) | {"wrong": wrong, "seconds": seconds}) + "\n")


def checked(workers: int, seconds: float, wanted: Sequence[str] = OPS) -> list[dict[str, Any]]:
    """Check all trials in processes of their own; return each as JSON, with what is `wrong` with it ("" of those that
    passed) and what it took."""  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="quantmill-tune-") as folder:
        paths = [Path(folder, f"{part}.jsonl") for part in range(workers)]
        command = [sys.executable, "-m", "benchmarks.tune", "--ops", *wanted, "--check"]
        running = [
            subprocess.Popen([*command, str(part), str(workers), str(path)], stdout=subprocess.DEVNULL)
            for part, path in enumerate(paths)
        ]
        deadline = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        lines = [line for path in paths if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        found[json.dumps([row["op"], row["tile"], row["side"]])] = {"wrong": "did not end", "seconds": 0.0} | row
    return list(found.values())


def passed(op: str, side: int, verdicts: Sequence[dict[str, Any]]) -> list[Tile]:
    """Return the tiles of an operator that passed, on images of this size or, where it was not tried, on any."""
    sides = {side} if side in SIDES else set(SIDES) | {0}
    rows = [row for row in verdicts if row["op"] == op and not row["wrong"]]
    tried = {Tile(**row["tile"]) for row in rows if row["side"] in sides or row["tile"]["kernel"] == POINTERS}
    return [tile for tile in tiles(op, torch.cuda.get_device_capability()) if tile in tried]


def cold_us(run: Callable[[], Any], flush: Tensor) -> float:
    """Median microseconds of a call, replayed from a CUDA graph with a cold L2 cache."""
    replay = captured(run)

    def once() -> float:
        flush.zero_()
        return 1000 * cuda_ms(replay)

    return statistics.median(once() for _ in range(REPEATS))


def ops_of(layer: Layer, capability: tuple[int, int]) -> Iterator[str]:
    """Yield the operators that a layer can be."""
    if layer.image is not None:
        yield from (CONV_INT8, *((CONV_PACKED, CONV_GROUPS) if capability[0] == 9 else ()))
    else:
        fp8 = (LINEAR_FP8,) if capability >= (8, 9) else ()
        yield from (LINEAR_INT8, *fp8, *((LINEAR_PACKED, LINEAR_GROUPS) if capability[0] == 9 else ()))


def measure(layer: Layer, op: str, candidates: Sequence[Tile], flush: Tensor) -> dict[str, Any]:
    """Time a layer in bfloat16, with today's choice and with each tile."""
    run, plain = problem(op, layer.shape, layer.image)
    want = run(None)
    times: list[tuple[float, Tile]] = []
    failed: dict[str, str] = {}
    before = cold_us(lambda: run(None), flush)
    for tile in candidates:
        try:
            got = run(tile)
            # Both were rounded to bfloat16, from sums that were added up in another order.
            wrong = distance(got, want) if op == LINEAR_FP8 else difference(got, want.float(), 2 * TOLERANCE)
            if wrong:
                failed[str(asdict(tile))] = wrong
            else:
                times.append((cold_us(lambda tile=tile: run(tile), flush), tile))  # type: ignore[misc]
        except Exception as error:
            failed[str(asdict(tile))] = f"{type(error).__name__}: {str(error)[:200]}"
    bfloat16 = cold_us(plain, flush)
    times.sort(key=lambda pair: pair[0])
    return {
        "layer": layer.name, "op": op, "shape": asdict(layer.shape), "bfloat16_us": round(bfloat16, 2),
        "before_us": round(before, 2), "tiles": [{"us": round(us, 2), "tile": asdict(tile)} for us, tile in times],
        "failed": failed, "gigaops": round(layer.operations / 1e9, 1),
    }  # fmt: skip


def best(found: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the fastest tile, where it gains enough over today's choice."""
    if not found["tiles"] or found["tiles"][0]["us"] * GAIN > found["before_us"]:
        return None
    first = found["tiles"][0]
    entry = Entry(found["op"], Shape(**found["shape"]), Tile(**first["tile"]))
    return row_of(entry, us=first["us"], before_us=found["before_us"], bfloat16_us=found["bfloat16_us"])


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Draw before and after, in speed over bfloat16."""
    lines = ["| layer | operator | bfloat16 us | before | after | tile |", "|---|---|---|---|---|---|"]
    for found in measured:
        fastest = found["tiles"][0] if found["tiles"] else {"us": found["before_us"], "tile": {}}
        base, tile = found["bfloat16_us"], fastest["tile"]
        name = " ".join(str(tile[key]) for key in ("kernel", "m", "n", "k", "warps", "stages", "halves") if key in tile)
        ratios = (base / found["before_us"], base / min(fastest["us"], found["before_us"]))
        lines.append(f"| {found['layer']} | {found['op']} | {base} | {ratios[0]:.2f} | {ratios[1]:.2f} | {name} |")
    return "\n".join(lines)


def tune(minutes: float, workers: int, out: Path | None, only: str = "", wanted: Sequence[str] = OPS) -> dict[str, Any]:
    """Check and time; write what there is to `out` after each layer."""
    import triton

    end = time.monotonic() + 60 * minutes
    capability = torch.cuda.get_device_capability()
    verdicts = checked(workers, 60 * minutes * CHECK_SHARE, wanted)
    measured: list[dict[str, Any]] = []
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    result = document(chip_of(torch.device("cuda", torch.cuda.current_device())), versions, [])
    result |= {"checked": verdicts, "measured": measured, "finished": False}
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    for layer in (layer for layer in LAYERS if only in layer.name):
        for op in (op for op in ops_of(layer, capability) if op in wanted):
            if time.monotonic() > end:
                return result
            side = layer.image[1] if layer.image else 0
            measured.append(measure(layer, op, passed(op, side, verdicts), flush))
            result["entries"] = [row for row in map(best, measured) if row is not None]
            if out is not None:
                keep(result, out)
    return result | {"finished": True}


def install(found: dict[str, Any]) -> None:
    """Write the table that the kernels read; an older one's tiles stay in it where none was found to be faster, but for
    those that were predicted (`benchmarks.time_model`) and have now been measured."""
    path = file_of(found["device"])
    path.parent.mkdir(exist_ok=True)
    now = {json.dumps([row["op"], row["shape"]]) for row in found["entries"]}
    older = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    timed = now | {json.dumps([row["op"], row["shape"]]) for row in found["measured"]}
    kept = [
        row for row in older if json.dumps([row["op"], row["shape"]]) not in (timed if "predicted_us" in row else now)
    ]
    table = {name: found[name] for name in ("device", "capability", "processors", "torch", "triton")}
    keep(table | {"entries": [*found["entries"], *kept]}, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--minutes", type=float, default=6.0)
    command.add_argument("--workers", type=int, default=12, help="processes that compile and check")
    command.add_argument("--only", default="", help="layers whose name contains this")
    command.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    command.add_argument("--out", type=Path)
    command.add_argument("--install", action="store_true", help="write the table that the kernels read")
    command.add_argument("--check", nargs=3, metavar=("PART", "PARTS", "FILE"), help="check a share of the tiles")
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    if options.check:
        check_share(int(options.check[0]), int(options.check[1]), Path(options.check[2]), options.ops)
        return 0
    found = tune(options.minutes, options.workers, options.out, options.only, options.ops)
    give(found, options.out)
    print(table(found["measured"]), file=sys.stderr)
    if options.install:
        install(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
