"""Predict Hopper's own loop on packed weights of 4 bits, beside the int8 that was measured, and choose its tiles.

    python -m benchmarks.own_loop_model [--table FILE] [--only TEXT] [--compiled FILE] [--install] [--out FILE]

The model is that of `benchmarks.time_model`, whose six numbers were fitted to other kernels. For each layer of
`benchmarks.tune` that FILE (by default that of an H100) has a measured tile for in int8: its time as measured and as
predicted, and what is predicted for the fastest tile with packed weights in groups of 64 that have multipliers, of
int8's as predicted and of bfloat16's as measured. `figures` has the spread of int8's errors and of these fractions.
Nothing of packed weights was timed: --install writes the chosen tiles into FILE with `predicted_us`, in place of
earlier ones that were predicted, and leaves those that `benchmarks.tune` timed. It needs no GPU; compiled counts are
kept in --out and may be given again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cli import give, keep, parser
from benchmarks.device_check import spread
from benchmarks.time_model import FITTED, Launch, predicted, usages_of
from benchmarks.tune import LAYERS, PACKED_GROUP, Layer, tiles
from kernels._triton.hopper_launch import largest_power, rectangle
from kernels._triton.tuned import CONV_INT8, CONV_PACKED, FOLDER, LINEAR_INT8, LINEAR_PACKED, Entry, Tile, row_of
from kernels.compile_report import Case, OwnTile, Usage, compile_case, own_case
from kernels.weights import MIN_LANE, WeightLayout

# In int8, tiles with tails gained 1.02 to 1.18 where the model says 1.19 to 1.51 (four shapes, on an H100).
TAIL_GAIN = 1.2
TABLE = FOLDER / "nvidia-h100-80gb-hbm3.json"
_FIELDS = ("kernel", "m", "n", "k", "warps", "stages", "halves", "per_processor")


def own_launch(layer: Layer, tile: Tile, *, packed: bool) -> tuple[Launch, Case]:
    """Return a layer's launch with a tile of Hopper's own loop, and what is compiled for it."""
    shape, area = layer.shape, None if layer.image is None else rectangle(tile.m, layer.image[1], layer.image[1])
    lane = 2 * MIN_LANE if shape.k % (4 * MIN_LANE) == 0 else MIN_LANE
    layout = WeightLayout(4, shape.k, shape.taps, lane, PACKED_GROUP, False, True) if packed else None
    what = "linear" if area is None else f"conv 3x3/1 on {area[0]} x {area[1]}"
    own = OwnTile(
        f"{what} {f'W4A8, {lane} codes' if packed else 'W8A8'}, {tile.k} of {tile.stages}",
        "i8", tile.m, tile.n, tile.k, tile.warps, tile.stages, tile.halves, area,
    )  # fmt: skip
    case = own_case(own, layout)
    weights = shape.n * shape.k * shape.taps
    moved = shape.m * shape.k + (weights // 2 if packed else weights) + 2 * shape.m * shape.n
    turns = shape.taps * math.ceil(shape.k / tile.k)
    return Launch(case.label, shape.m, shape.n, turns, tile.m, tile.n, tile.k, tile.warps, moved), case


def own_us(launch: Launch, case: Case, usages: dict[str, Usage]) -> float:
    """Return microseconds of a launch, compiled once."""
    if launch.kernel not in usages:
        usages[launch.kernel] = compile_case(case, "sm_90")
    return FITTED.launch + predicted(launch, usages[launch.kernel], FITTED)


def rows_of(layers: Sequence[Layer], table: dict[str, Any], usages: dict[str, Usage]) -> Iterator[dict[str, Any]]:
    """Yield what is measured and predicted of each layer, with the tile that is chosen for packed weights."""
    timed = {(row["op"], json.dumps(row["shape"])): row for row in table["entries"] if "us" in row}
    for layer in layers:
        int8, four = (LINEAR_INT8, LINEAR_PACKED) if layer.image is None else (CONV_INT8, CONV_PACKED)
        row = timed.get((int8, json.dumps(asdict(layer.shape))))
        us = {tile: own_us(*own_launch(layer, tile, packed=True), usages) for tile in tiles(four, (9, 0))}
        best = chosen(us)
        tried = [{"us": round(each, 1), "tile": name_of(tile)} for tile, each in us.items()]
        found: dict[str, Any] = {"layer": layer.name, "op": four, "packed": round(us[best], 1), "tiles": tried}
        found["tile"] = asdict(best)
        if row is not None and row["tile"]["kernel"] == "hopper":
            ours = own_us(*own_launch(layer, Tile(**row["tile"]), packed=False), usages)
            found |= {"int8 measured": row["us"], "int8": round(ours, 1), "int8 error": round(ours / row["us"] - 1, 3)}
            found |= {"of int8": round(ours / us[best], 3), "of bfloat16": round(row["bfloat16_us"] / us[best], 3)}
        yield found


def chosen(us: Mapping[Tile, float]) -> Tile:
    """Return the fastest tile, the first of several; one with a tail of rows only where it gains TAIL_GAIN."""
    plain, tailed = (
        min(
            (tile for tile in us if (tile.m == largest_power(tile.m)) == is_plain),
            key=lambda tile: us[tile],
            default=None,
        )
        for is_plain in (True, False)
    )
    assert plain is not None
    return plain if tailed is None or us[plain] <= TAIL_GAIN * us[tailed] else tailed


def name_of(tile: Tile) -> str:
    """Return a tile in a line."""
    return " ".join(str(getattr(tile, field)) for field in _FIELDS)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return least, median and greatest of what is compared, of Linears and of convolutions."""
    found = {}
    for op in (LINEAR_PACKED, CONV_PACKED):
        for name in ("int8 error", "of int8", "of bfloat16"):
            values = [row[name] for row in rows if row["op"] == op and name in row]
            if values:
                found[f"{op}, {name}"] = spread(values) | {"layers": len(values)}
    return found


def install(rows: Sequence[dict[str, Any]], layers: Sequence[Layer], table: dict[str, Any], path: Path) -> None:
    """Write the chosen tiles into a table, but for shapes that were timed."""
    shapes = {layer.name: layer.shape for layer in layers}
    kept = [row for row in table["entries"] if "predicted_us" not in row]
    timed = {json.dumps([row["op"], row["shape"]]) for row in kept}
    new = [
        row_of(Entry(row["op"], shapes[row["layer"]], Tile(**row["tile"])), predicted_us=row["packed"]) for row in rows
    ]
    keep(
        table | {"entries": [*kept, *(row for row in new if json.dumps([row["op"], row["shape"]]) not in timed)]}, path
    )


def main() -> None:
    """Run the command of this module's docstring."""
    options = parser(__doc__)
    options.add_argument("--table", type=Path, default=TABLE)
    options.add_argument("--only", default="", help="layers whose name contains this")
    options.add_argument("--compiled", type=Path, help="what an earlier --out holds, to compile nothing again")
    options.add_argument("--install", action="store_true", help="write the chosen tiles into the table")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    table = json.loads(args.table.read_text(encoding="utf-8"))
    usages = {} if args.compiled is None else usages_of(json.loads(args.compiled.read_text(encoding="utf-8")))
    layers = [layer for layer in LAYERS if args.only in layer.name]
    rows = list(rows_of(layers, table, usages))
    compiled = {name: asdict(usage) for name, usage in sorted(usages.items())}
    give({"device": table["device"], "figures": figures(rows), "rows": rows, "compiled": compiled}, args.out)
    if args.install:
        install(rows, layers, table, args.table)


if __name__ == "__main__":
    main()
