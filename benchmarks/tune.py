"""Time tiles of the 8-bit kernels on this GPU, for the layers of SD 1.5, SDXL, DiT-XL, SD3 and Flux.

    python -m benchmarks.tune [--minutes 6] [--workers 8] [--out FILE] [--install]

First every tile is compiled and checked, in processes of their own: each multiplies a small problem with tails, zero
points, bias and residual, and what is not the reference's is left out, as is what does not end. Then each layer is
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
from benchmarks.timing import captured, cuda_ms
from benchmarks.weights import random_weight
from kernels._triton.conv import launch_conv2d_int
from kernels._triton.fp8 import launch_linear_fp8
from kernels._triton.gemm import launch_linear_int
from kernels._triton.tuned import (
    CONV_INT8,
    HOPPER,
    LINEAR_FP8,
    LINEAR_INT8,
    POINTERS,
    Entry,
    Shape,
    Tile,
    document,
    file_of,
    row_of,
)
from kernels.activations import ActivationTable, quantize_by_table
from kernels.conv import ConvGeometry, conv2d_int_reference
from kernels.epilogue import EpilogueRows
from kernels.fp8 import Fp8Matrix, linear_fp8_reference, quantize_fp8
from kernels.gemm import linear_int_reference

HALF = torch.bfloat16
#: What a tile must gain over today's choice to be kept.
GAIN = 1.02
#: Seconds that one tile's compilation and check may take.
CHECK_SECONDS = 40.0
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
            *((128, 128, 128, 8, 3), (128, 128, 128, 4, 3), (128, 256, 128, 8, 3), (128, 128, 64, 8, 4)),
            *((128, 128, 64, 4, 4), (64, 128, 128, 4, 3), (128, 64, 128, 4, 3), (64, 64, 128, 4, 4)),
        )
    ]
    hopper = [
        Tile(HOPPER, m, n, k, warps, stages, halves=halves, per_processor=programs)
        for m, n, k, warps, stages, halves, programs in (
            *((128, 128, 128, 4, 3, 2, 2), (128, 128, 128, 8, 4, 1, 1), (128, 256, 128, 8, 3, 1, 1)),
            *((256, 128, 128, 8, 3, 1, 1), (128, 256, 128, 8, 4, 2, 1), (256, 128, 128, 8, 4, 2, 1)),
            *((128, 128, 64, 4, 4, 1, 2), (128, 128, 64, 8, 6, 1, 1), (64, 128, 128, 4, 4, 1, 2)),
            *((128, 64, 128, 4, 4, 1, 2), (64, 256, 128, 4, 4, 1, 1), (128, 256, 64, 8, 6, 2, 1)),
        )
    ]
    return pointers + (hopper if capability[0] == 9 else [])


def normal_codes(*shape: int) -> Tensor:
    """Return int8 codes of normal data: a step of 0.03, so that four standard deviations fill the grid."""
    grid = ActivationTable(torch.tensor([0.03], device="cuda"), torch.tensor([120.0], device="cuda"), 8)
    return quantize_by_table(torch.randn(*shape, device="cuda", dtype=HALF), grid).codes


Run = Callable[[Tile | None], Tensor]


def problem(op: str, shape: Shape, image: tuple[int, int] | None) -> tuple[Run, Callable[[], Tensor]]:
    """Return an operator on data of a shape, to be run with a tile, and the same layer in bfloat16."""
    out = EpilogueRows(torch.zeros(shape.n, device="cuda", dtype=HALF), None, None, None)
    if op == LINEAR_FP8:
        x, w = (torch.randn(size, shape.k, device="cuda", dtype=HALF) for size in (shape.m, shape.n))
        left, right = quantize_fp8(x), quantize_fp8(w)
        return lambda tile: launch_linear_fp8(left, right, out, HALF, tile), lambda: F.linear(x, w)
    weight = [random_weight(shape.n, shape.k, shape.taps, 8, uniform=False, device="cuda")]
    grid = ActivationTable(torch.tensor([0.03], device="cuda"), torch.tensor([120.0], device="cuda"), 8)
    if image is None:
        x = torch.randn(shape.m, shape.k, device="cuda", dtype=HALF)
        w = torch.randn(shape.n, shape.k, device="cuda", dtype=HALF)
        codes = quantize_by_table(x, grid)
        return lambda tile: launch_linear_int(codes, weight, out, shape.n, HALF, tile), lambda: F.linear(x, w)
    batch, side = image
    x = torch.randn(batch, side, side, shape.k, device="cuda", dtype=HALF)
    kernel = torch.randn(shape.n, shape.k, 3, 3, device="cuda", dtype=HALF).to(memory_format=torch.channels_last)
    codes, nchw, geometry = quantize_by_table(x, grid), x.permute(0, 3, 1, 2), ConvGeometry((3, 3), padding=(1, 1))
    return (
        lambda tile: launch_conv2d_int(codes, weight, geometry, out, shape.n, HALF, tile),
        lambda: F.conv2d(nchw, kernel, padding=1),
    )


def check(op: str, tile: Tile) -> str:
    """Multiply a small problem with tails; say what is wrong with the result, or nothing."""
    torch.manual_seed(0)
    n, k = 392, 336
    bias = torch.randn(n, device="cuda", dtype=HALF)
    if op == LINEAR_FP8:
        left, right = (quantize_fp8(torch.randn(size, k, device="cuda")) for size in (1000, n))
        residual = torch.randn(1000, n, device="cuda", dtype=HALF)
        rows = EpilogueRows(bias, residual, None, None)
        got = launch_linear_fp8(left, right, rows, HALF, tile)
        want = linear_fp8_reference(Fp8Matrix(left.values, left.scale), right, rows, torch.float32)
        return distance(got, want)
    taps = 9 if op == CONV_INT8 else 1
    weight = random_weight(n, k, taps, 8, uniform=False, device="cuda")
    shape = (2, 20, 24, k) if op == CONV_INT8 else (1000, k)
    grid = ActivationTable(torch.tensor([0.03, 0.02], device="cuda"), torch.tensor([120.0, 3.0], device="cuda"), 8)
    x = quantize_by_table(torch.randn(*shape, device="cuda"), grid, torch.tensor([0, 1], device="cuda"))
    rows = EpilogueRows(bias, torch.randn(x.codes.numel() // k, n, device="cuda", dtype=HALF), None, None)
    if op == CONV_INT8:
        geometry = ConvGeometry((3, 3), padding=(1, 1))
        got = launch_conv2d_int(x, [weight], geometry, rows, n, HALF, tile)
        return difference(got, conv2d_int_reference(x, [weight], geometry, rows, n))
    got = launch_linear_int(x, [weight], rows, n, HALF, tile)
    return difference(got, linear_int_reference(x.codes, x.scale, x.zero_point, [weight], rows, n))


def distance(got: Tensor, want: Tensor) -> str:
    """Say how far a sum of FP8 products is from the one wanted, in all, if that is too far."""
    far = float((got.float() - want.float()).norm() / want.float().norm())
    return "" if far <= FP8_DISTANCE else f"got a relative distance of {far:.2g}, wanted at most {FP8_DISTANCE}"


def difference(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> str:
    """Say how far values of exact sums are from those wanted, at worst, if that is too far."""
    far = (got.float() - want.view(got.shape)).abs() / (want.view(got.shape).abs() + 1e-2)
    worst = float(far.nan_to_num(float("inf")).max())
    return "" if worst <= tolerance else f"got a relative difference of {worst:.2g}, wanted at most {tolerance:.2g}"


def check_share(part: int, parts: int, path: Path) -> None:
    """Check each `parts`th tile, writing a line before and one after, so that one that does not end is known."""
    capability = torch.cuda.get_device_capability()
    with path.open("a", encoding="utf-8", buffering=1) as lines:
        for op, tile in pairs(capability)[part::parts]:
            lines.write(json.dumps({"op": op, "tile": asdict(tile)}) + "\n")
            try:
                wrong = check(op, tile)
            except Exception as error:  # a tile that the compiler or the device refuses is left out
                wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:200]}"
            lines.write(json.dumps({"op": op, "tile": asdict(tile), "wrong": wrong}) + "\n")


def pairs(capability: tuple[int, int]) -> list[tuple[str, Tile]]:
    """Return every operator with every tile of it."""
    ops = (LINEAR_INT8, CONV_INT8, *((LINEAR_FP8,) if capability >= (8, 9) else ()))
    return [(op, tile) for tile_at in range(64) for op in ops for tile in tiles(op, capability)[tile_at : tile_at + 1]]


def checked(workers: int, seconds: float) -> dict[tuple[str, Tile], str]:
    """Check all tiles in processes of their own; return what is wrong with each, nothing with those that passed."""
    with tempfile.TemporaryDirectory(prefix="quantmill-tune-") as folder:
        paths = [Path(folder, f"{part}.jsonl") for part in range(workers)]
        command = [sys.executable, "-m", "benchmarks.tune", "--check"]
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
        found: dict[tuple[str, Tile], str] = {}
        for path in paths:
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                row = json.loads(line)
                found[row["op"], Tile(**row["tile"])] = row.get("wrong", "did not end")
        return found


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
        yield CONV_INT8
    else:
        yield from (LINEAR_INT8, *((LINEAR_FP8,) if capability >= (8, 9) else ()))


def measure(layer: Layer, op: str, passed: Sequence[Tile], flush: Tensor) -> dict[str, Any]:
    """Time a layer in bfloat16, with today's choice and with each tile."""
    run, plain = problem(op, layer.shape, layer.image)
    want = run(None)
    times: list[tuple[float, Tile]] = []
    failed: dict[str, str] = {}
    before = cold_us(lambda: run(None), flush)
    for tile in passed:
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


def tune(minutes: float, workers: int, out: Path | None) -> dict[str, Any]:
    """Check and time; write what there is to `out` after each layer."""
    import triton

    end = time.monotonic() + 60 * minutes
    capability = torch.cuda.get_device_capability()
    verdicts = checked(workers, min(30 * minutes, 150.0))
    name = torch.cuda.get_device_name()
    wrong = [{"op": op, "tile": asdict(tile), "wrong": text} for (op, tile), text in verdicts.items() if text]
    measured: list[dict[str, Any]] = []
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    result: dict[str, Any] = {"left_out": wrong, "measured": measured, "finished": False}
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    for layer in LAYERS:
        for op in ops_of(layer, capability):
            if time.monotonic() > end:
                break
            passed = [tile for (of, tile), text in verdicts.items() if of == op and not text]
            measured.append(measure(layer, op, passed, flush))
            rows = [row for row in map(best, measured) if row is not None]
            result |= document(name, versions, rows)
            if out is not None:
                keep(result, out)
    return result | {"finished": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--minutes", type=float, default=6.0)
    command.add_argument("--workers", type=int, default=8, help="processes that compile and check")
    command.add_argument("--out", type=Path)
    command.add_argument("--install", action="store_true", help="write the table that the kernels read")
    command.add_argument("--check", nargs=3, metavar=("PART", "PARTS", "FILE"), help="check a share of the tiles")
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    if options.check:
        check_share(int(options.check[0]), int(options.check[1]), Path(options.check[2]))
        return 0
    found = tune(options.minutes, options.workers, options.out)
    give(found, options.out)
    print(table(found["measured"]), file=sys.stderr)
    if options.install:
        path = file_of(found["device"])
        path.parent.mkdir(exist_ok=True)
        keep({name: found[name] for name in ("device", "torch", "triton", "entries")}, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
