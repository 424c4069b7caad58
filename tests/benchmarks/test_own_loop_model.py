"""What is predicted of packed weights on Hopper, from the counts that are kept, and the tiles that come of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.own_loop_model import TABLE, figures, install, own_launch, own_us, rows_of
from benchmarks.time_model import usages_of
from benchmarks.tune import LAYERS
from kernels._triton.tuned import LINEAR_PACKED, Tile

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "own-loop-model.json"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(RESULTS.read_text())
    return document


def test_packed_weights_are_predicted_near_int8(kept: dict[str, Any]) -> None:
    """From the compiled counts that were kept: nothing is compiled."""
    usages = usages_of(kept)
    before = dict(usages)
    rows = list(rows_of(LAYERS, json.loads(TABLE.read_text()), usages))
    assert usages == before
    assert [row["packed"] for row in rows] == [row["packed"] for row in kept["rows"]]
    found = figures(rows)
    assert found == kept["figures"]
    assert all(found[f"{op}, of int8"]["median"] >= 0.9 for op in ("linear_int4", "conv_int4"))


def test_a_launch_has_the_bytes_of_packed_weights(kept: dict[str, Any]) -> None:
    layer = LAYERS[1]
    tile = Tile(**next(row["tile"] for row in kept["rows"] if row["layer"] == layer.name))
    packed, case = own_launch(layer, tile, packed=True)
    plain, _ = own_launch(layer, tile, packed=False)
    assert plain.bytes - packed.bytes == layer.n * layer.k // 2
    assert own_us(packed, case, usages_of(kept)) > 0


def test_tiles_that_were_timed_stay(kept: dict[str, Any], tmp_path: Path) -> None:
    first, second = (layer for layer in LAYERS[1:3])
    tile = asdict(Tile("hopper", 128, 128, 128, 4, 3))
    timed = {"op": LINEAR_PACKED, "shape": asdict(first.shape), "tile": tile, "us": 1.0}
    guessed = {"op": LINEAR_PACKED, "shape": asdict(second.shape), "tile": tile, "predicted_us": 1.0}
    rows = [row for row in kept["rows"] if row["layer"] in (first.name, second.name)]
    path = tmp_path / "table.json"
    install(rows, (first, second), {"entries": [timed, guessed]}, path)
    written = json.loads(path.read_text())["entries"]
    assert written[0] == timed
    assert [(row["shape"], row["predicted_us"]) for row in written[1:]] == [(asdict(second.shape), rows[1]["packed"])]
