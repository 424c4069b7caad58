"""Tiles measured on a device: `tuned/<device>.json`, written by `python -m benchmarks.tune`, read when kernels start.

An entry says for one operator and one shape which kernel and tile was fastest there. Shapes that were not measured take
the nearest one's, in the logarithms of rows, columns and depth. A device without a file takes that of one with as many
multiprocessors of the same compute capability (an H200 is an H100 with other memory); others take what
`kernels._triton.blocks` says. Results do not change: integers are the same with any tile.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.weights import WeightLayout

FOLDER = Path(__file__).parent / "tuned"
#: Operators that have entries.
LINEAR_INT8, CONV_INT8, LINEAR_FP8 = "linear_int8", "conv_int8", "linear_fp8"
LINEAR_GROUPS, CONV_GROUPS = "linear_int8_groups", "conv_int8_groups"
LINEAR_PACKED, CONV_PACKED = "linear_int4", "conv_int4"
#: Kernels that an entry may name: Triton's own pipeline over pointers, or `kernels._triton.hopper`.
POINTERS, HOPPER = "pointers", "hopper"
#: How far (in powers of two, summed over rows, columns and depth) a shape may be from one that was measured.
NEAR = 4.0


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel cuts its work: `k` counts codes; `stages` operand buffers; `halves` parts an output tile is written
    in; `per_processor` programs that live on a multiprocessor at once (the last two of HOPPER alone)."""  # fmt: skip

    kernel: str
    m: int
    n: int
    k: int
    warps: int
    stages: int
    swizzle: int = 8
    halves: int = 1
    per_processor: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A product of (m, taps * k) with (taps * k, n); `taps` is 1 of a Linear."""

    m: int
    n: int
    k: int
    taps: int = 1

    def distance(self, other: Shape) -> float:
        """Return how far apart two shapes are, in powers of two."""
        pairs = ((self.m, other.m), (self.n, other.n), (self.k * self.taps, other.k * other.taps))
        return sum(abs(math.log2(one / two)) for one, two in pairs)


@dataclass(frozen=True, slots=True)
class Entry:
    """The fastest tile of an operator and a shape."""

    op: str
    shape: Shape
    tile: Tile


def operator_of(layout: WeightLayout, *, conv: bool) -> str:
    """Return which operator multiplies a weight: of groups with scales, of packed 4 bits, or else of int8."""
    if layout.has_group_scales:
        return CONV_GROUPS if conv else LINEAR_GROUPS
    if layout.bits == 4:
        return CONV_PACKED if conv else LINEAR_PACKED
    return CONV_INT8 if conv else LINEAR_INT8


def tuned_tile(device: torch.device, op: str, shape: Shape) -> Tile | None:
    """Return the tile of the nearest shape that was measured on this device; None if none is near."""
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return None
    return _tile_of(chip_of(device), op, shape)


@lru_cache(maxsize=4096)
def _tile_of(chip: Chip, op: str, shape: Shape) -> Tile | None:
    """Look a shape up once; models call a few of them, over and over."""
    return nearest(entries_of(chip), op, shape)


def nearest(entries: Iterable[Entry], op: str, shape: Shape) -> Tile | None:
    """Return the tile of the nearest entry of an operator within NEAR; one tap never stands in for several."""
    found = [entry for entry in entries if entry.op == op and (entry.shape.taps > 1) == (shape.taps > 1)]
    best = min(found, key=lambda entry: entry.shape.distance(shape), default=None)
    return best.tile if best is not None and best.shape.distance(shape) <= NEAR else None


def file_of(device_name: str) -> Path:
    """Return the file of a device by its name."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@dataclass(frozen=True, slots=True)
class Chip:
    """What a table is of: the device's name, its compute capability and how many multiprocessors it has."""

    name: str
    capability: tuple[int, int]
    processors: int


@lru_cache
def chip_of(device: torch.device) -> Chip:
    """Ask a CUDA device what it is."""
    found = torch.cuda.get_device_properties(device)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count)


@lru_cache
def entries_of(chip: Chip) -> tuple[Entry, ...]:
    """Read a device's entries, or those of a device with the same processor; none if there is no file."""
    own = file_of(chip.name)
    for path in (own, *sorted(FOLDER.glob("*.json"))):
        table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        same = table is not None and (tuple(table["capability"]), table["processors"]) == (
            chip.capability, chip.processors,
        )  # fmt: skip
        if table is not None and (same or path == own):
            return tuple(Entry(row["op"], Shape(**row["shape"]), Tile(**row["tile"])) for row in table["entries"])
    return ()


def document(chip: Chip, versions: dict[str, str], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what a device's file holds; a row is an entry as JSON, with what was measured beside it."""
    known = {"device": chip.name, "capability": list(chip.capability), "processors": chip.processors}
    return {**known, **versions, "entries": list(rows)}


def row_of(entry: Entry, **measured: float) -> dict[str, Any]:
    """Return an entry as JSON."""
    return {"op": entry.op, "shape": asdict(entry.shape), "tile": asdict(entry.tile), **measured}
