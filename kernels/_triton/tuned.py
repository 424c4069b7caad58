"""Tiles measured on a device: `tuned/<device>.json`, written by `python -m benchmarks.tune`, read when kernels start.

An entry says for one operator and one shape which kernel and tile was fastest there. Shapes that were not measured take
the nearest one's, in the logarithms of rows, columns and depth; devices without a file take what
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

FOLDER = Path(__file__).parent / "tuned"
#: Operators that have entries.
LINEAR_INT8, CONV_INT8, LINEAR_FP8 = "linear_int8", "conv_int8", "linear_fp8"
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


def tuned_tile(device: torch.device, op: str, shape: Shape) -> Tile | None:
    """Return the tile of the nearest shape that was measured on this device; None if none is near."""
    if triton.knobs.runtime.interpret or device.type != "cuda":
        return None
    return nearest(entries_of(torch.cuda.get_device_name(device)), op, shape)


def nearest(entries: Iterable[Entry], op: str, shape: Shape) -> Tile | None:
    """Return the tile of the nearest entry of an operator within NEAR; one tap never stands in for several."""
    found = [entry for entry in entries if entry.op == op and (entry.shape.taps > 1) == (shape.taps > 1)]
    best = min(found, key=lambda entry: entry.shape.distance(shape), default=None)
    return best.tile if best is not None and best.shape.distance(shape) <= NEAR else None


def file_of(device_name: str) -> Path:
    """Return the file of a device by its name."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@lru_cache
def entries_of(device_name: str) -> tuple[Entry, ...]:
    """Read a device's entries; none if it has no file."""
    path = file_of(device_name)
    if not path.is_file():
        return ()
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return tuple(Entry(row["op"], Shape(**row["shape"]), Tile(**row["tile"])) for row in rows)


def document(device_name: str, versions: dict[str, str], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what a device's file holds; a row is an entry as JSON, with what was measured beside it."""
    return {"device": device_name, **versions, "entries": list(rows)}


def row_of(entry: Entry, **measured: float) -> dict[str, Any]:
    """Return an entry as JSON."""
    return {"op": entry.op, "shape": asdict(entry.shape), "tile": asdict(entry.tile), **measured}
