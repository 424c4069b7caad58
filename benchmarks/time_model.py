"""Predict a kernel's time on Hopper from what it was compiled to, and compare with times that were measured.

    python -m benchmarks.time_model --measured FILE [--compiled FILE] [--fit] [--out FILE]

FILE is what `benchmarks.kernels` wrote on an H100 or H200 before it had a table of tiles. Each of its rows is one
launch or several; of each, the compiled main loop (`kernels.compile_report`) says how many cycles of tensor cores and
how many instructions a turn takes:

    turn    = max(products, instructions) if a product stays in flight, else products + instructions + WAIT
    tile    = turns * turn + TILE                                       cycles of a multiprocessor
    launch  = LAUNCH + max(waves * tile / clock, bytes / bandwidth) + scattered bytes / bandwidth           us

Products cost what the data sheet says; instructions are ISSUE cycles of a scheduler each, CONVERSION for those that
convert or move bytes. `waves` counts whole rounds of tiles over all places that multiprocessors have for programs
(registers and shared memory limit them); programs that share one divide its tensor cores and schedulers, but wait side
by side. Channels that are named (mixed bits) are written two bytes here and there, SCATTERED bytes of memory each. The
six numbers are of all kernels and shapes, fitted by --fit to the measured rows, least squares of logarithms. It needs
no GPU. Compiled counts are kept in --out and may be given again.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cli import give, parser
from benchmarks.kernels import LAYERS, Layer
from kernels.compile_report import Case, Usage, cases, compile_case, conv_case, gathered, linear_case
from kernels.weights import MIN_LANE, WeightLayout

PROCESSORS, CLOCK = 132, 1755.0  # multiprocessors; cycles in a microsecond
REGISTERS, SHARED, SCHEDULERS = 65536, 227 * 1024, 4
BANDWIDTH = 2.7e6  # bytes in a microsecond
# Products of a multiprocessor in a cycle, by the data sheet.
INT8_PRODUCTS, HALF_PRODUCTS = 4096, 2048
WITHIN = 0.25
# Kernels of benchmarks.kernels that are modelled.
ROWS = ("W8A8", "W4A8", "W4A8 g64", "W3/4/5A8", "W4A16", "FP8")
# Kernels that came later, which were not timed in this way: they are predicted.
LATER = ("W3/4/5A8, one launch",)


@dataclass(frozen=True, slots=True)
class Constants:
    """Cycles of an issued instruction and of one that converts, of a turn's waits, of what surrounds a tile's loop;
    microseconds of a launch; bytes of memory that a scattered value moves."""  # fmt: skip

    instruction: float
    conversion: float
    wait: float
    tile: float
    launch: float
    scattered: float


# To 118 rows of an H200, 113 of which it is within a quarter of: benchmarks/results/time-model.json.
FITTED = Constants(1.961, 1.502, 20.3, 3880.0, 7.28, 45.7)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel on one shape: (m, k * taps) codes times n rows, in tiles of `rows` x `columns`, `depth` a turn."""

    kernel: str
    m: int
    n: int
    turns: int
    rows: int
    columns: int
    depth: int
    warps: int
    bytes: int
    scattered: int = 0


def launches(layer: Layer, batch: int, name: str) -> list[tuple[Launch, Case]]:
    """Return what a row of the measured table launches."""
    from kernels._triton.blocks import float_blocks, fp8_blocks, int_blocks

    m = batch * layer.size * (layer.size if layer.kernel else 1)
    c, taps, one = layer.channels, layer.taps, layer.kernel <= 1

    def int_launch(bits: int, group: int, share: float, *, symmetric: bool, gather: bool) -> tuple[Launch, Case]:
        lane = 2 * MIN_LANE if c % (2 * MIN_LANE * 8 // bits) == 0 and group % (2 * MIN_LANE) == 0 else MIN_LANE
        layout = WeightLayout(bits, c, taps, MIN_LANE if bits == 8 else lane, group, symmetric)
        n = round(layer.outputs * share)
        blocks = int_blocks("sm_90", m, n, layout, heavy=gather)
        label = f"W{bits}A8{' symmetric' if symmetric else ''}{f' g{group}' if group else ''}"
        label += f", {blocks.k if bits == 8 else lane} codes"
        case = (
            linear_case(label, layout, blocks, x_symmetric=False)
            if one
            else conv_case(label, layout, blocks, x_symmetric=False, taps=layer.kernel, stride=1)
        )
        if gather:
            case = replace(gathered(case, added=False), label=f"{case.label}, gathered")
        depth = blocks.k if bits == 8 else lane * 8 // bits
        moved = m * c + n * c * taps * bits // 8 + 2 * m * n
        turns = taps * math.ceil(c / depth)
        scattered = m * n if gather else 0
        return Launch(case.label, m, n, turns, blocks.m, blocks.n, depth, blocks.warps, moved, scattered), case

    if name == "W3/4/5A8":
        return [int_launch(bits, 0, 1 / 3, symmetric=False, gather=True) for bits in (4, 4, 8)]
    if name == "W3/4/5A8, one launch":  # 5 bits are stored less their zero points
        return [
            int_launch(4, 0, 2 / 3, symmetric=False, gather=True),
            int_launch(8, 0, 1 / 3, symmetric=True, gather=True),
        ]
    if name.startswith("W8") or name.startswith("W4A8"):
        bits, group = int(name[1]), 64 if name.endswith("g64") else 0
        return [int_launch(bits, group, 1, symmetric=bits == 8, gather=False)]
    n = layer.outputs
    known = {case.label: case for case in cases("sm_90")}
    blocks = float_blocks("sm_90", m, n, grouped=False) if name == "W4A16" else fp8_blocks("sm_90", m, n)
    label = f"linear {name}, {blocks.m} x {blocks.n}"
    if label not in known or m <= 64:
        return []
    depth, moved = (128, m * c * 2 + n * c // 2) if name == "W4A16" else (blocks.k, m * c + n * c)
    launch = Launch(label, m, n, math.ceil(c / depth), blocks.m, blocks.n, depth, blocks.warps, moved + 2 * m * n)
    return [(launch, known[label])]


def predicted(launch: Launch, usage: Usage, constants: Constants) -> float:
    """Return microseconds of a launch."""
    threads = 32 * launch.warps
    places = min(REGISTERS // (max(usage.registers, 16) * threads), SHARED // max(usage.shared, 1), 2048 // threads)
    places = max(1, places)
    tiles = math.ceil(launch.m / launch.rows) * math.ceil(launch.n / launch.columns)
    shared = max(1, min(places, math.ceil(tiles / PROCESSORS)))
    turn = constants.wait
    if usage.loop is not None:
        loop, rate = usage.loop, HALF_PRODUCTS if "A16" in launch.kernel else INT8_PRODUCTS
        tensor = launch.rows * launch.columns * launch.depth / rate
        plain = constants.instruction * (loop.products + loop.stores + loop.barriers + loop.others)
        issue = (plain + constants.conversion * loop.conversions) * launch.warps / SCHEDULERS
        alone = max(tensor, issue) if loop.in_flight else tensor + issue + constants.wait
        turn = max(alone, shared * tensor, shared * issue)
    waves = math.ceil(tiles / (PROCESSORS * shared))
    cycles = waves * (launch.turns * turn + constants.tile)
    return max(cycles / CLOCK, launch.bytes / BANDWIDTH) + constants.scattered * launch.scattered / BANDWIDTH


def measured_rows(document: Mapping[str, Any], names: Sequence[str] = ROWS) -> Iterator[tuple[Layer, int, str, float]]:
    """Yield layer, batch, kernel and microseconds of each row that is modelled."""
    layers = {layer.name: layer for layer in LAYERS}
    for batch, table in document["batches"].items():
        for layer, rows in table.items():
            for name in names:
                if name in rows and layer in layers and "us" in rows[name]:
                    yield layers[layer], int(batch), name, float(rows[name]["us"])


def fit(rows: Sequence[tuple[list[Launch], float]], usages: Mapping[str, Usage]) -> Constants:
    """Return constants with the least squares of logarithms, by trying factors of each in turn."""

    def loss(constants: Constants) -> float:
        return sum(math.log(row_us(group, usages, constants) / us) ** 2 for group, us in rows)

    best = FITTED
    for factor in (2.0, 1.4, 1.15, 1.05, 1.02):
        for _ in range(6):
            for name, by in itertools.product(asdict(best), (factor, 1 / factor)):
                other = replace(best, **{name: getattr(best, name) * by})
                best = other if loss(other) < loss(best) else best
    return best


def row_us(group: Sequence[Launch], usages: Mapping[str, Usage], constants: Constants) -> float:
    """Return microseconds of a row: its launches one after another."""
    return sum(constants.launch + predicted(launch, usages[launch.kernel], constants) for launch in group)


def main() -> None:
    """Compile, predict, compare, print JSON and write it."""
    options = parser(__doc__)
    options.add_argument("--measured", type=Path, required=True)
    options.add_argument("--compiled", type=Path, help="what an earlier --out holds, to compile nothing again")
    options.add_argument("--fit", action="store_true")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    document = json.loads(args.measured.read_text())
    usages = {} if args.compiled is None else usages_of(json.loads(args.compiled.read_text()))
    rows = []
    for layer, batch, name, us in measured_rows(document):
        found = launches(layer, batch, name)
        for launch, case in found:
            if launch.kernel not in usages:
                usages[launch.kernel] = compile_case(case, "sm_90")
        if found:
            rows.append((layer, batch, name, [launch for launch, _ in found], us))
    constants = fit([(group, us) for *_, group, us in rows], usages) if args.fit else FITTED
    later = []
    for layer, batch, _, us in measured_rows(document, ("bfloat16",)):
        for name in LATER:
            found = launches(layer, batch, name)
            for launch, case in found:
                if launch.kernel not in usages:
                    usages[launch.kernel] = compile_case(case, "sm_90")
            ours = constants.launch + sum(predicted(launch, usages[launch.kernel], constants) for launch, _ in found)
            later.append({"layer": layer.name, "batch": batch, "kernel": name, "predicted": round(ours, 1),
                          "of bfloat16's speed": round(us / ours, 2)})  # fmt: skip
    give(report(rows, usages, constants, document["device"]["name"]) | {"never timed": later}, args.out)


def report(
    rows: Sequence[tuple[Layer, int, str, list[Launch], float]],
    usages: Mapping[str, Usage],
    constants: Constants,
    device: str,
) -> dict[str, Any]:
    """Return each row's time and prediction, and how many are within a quarter, by kernel."""
    lines = [
        {"layer": layer.name, "batch": batch, "kernel": name, "us": us, "predicted": round(us_of, 1),
         "error": round(us_of / us - 1, 3)}
        for layer, batch, name, group, us in rows
        for us_of in (row_us(group, usages, constants),)
    ]  # fmt: skip
    errors = {name: [line["error"] for line in lines if line["kernel"] == name] for name in ROWS}
    figures = {
        name: {"rows": len(each), "within a quarter": sum(abs(e) <= WITHIN for e in each),
               "median": statistics.median(abs(e) for e in each), "greatest": max(each, key=abs)}
        for name, each in errors.items() if each
    }  # fmt: skip
    compiled = {name: asdict(usage) for name, usage in sorted(usages.items())}
    return {"device": device, "constants": asdict(constants), "figures": figures, "rows": lines, "compiled": compiled}


def usages_of(document: Mapping[str, Any]) -> dict[str, Usage]:
    """Read what `report` wrote of compiled kernels."""
    from kernels.compile_report import Loop

    return {
        name: Usage(**{**usage, "loop": None if usage["loop"] is None else Loop(**usage["loop"])})
        for name, usage in document["compiled"].items()
    }


if __name__ == "__main__":
    main()
