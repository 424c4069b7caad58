"""What the model of kernels' times says of those that were measured, from the counts that it keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import LAYERS
from benchmarks.time_model import FITTED, ROWS, WITHIN, Constants, Launch, launches, predicted, row_us, usages_of
from kernels.compile_report import Loop, Usage

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "time-model.json"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(RESULTS.read_text())
    return document


def test_rows_are_predicted_within_a_quarter(kept: dict[str, Any]) -> None:
    """All but a few, which are launches of some 10 us; and all of the five shapes at batch 8 that matter most."""
    usages, layers = usages_of(kept), {layer.name: layer for layer in LAYERS}
    off = []
    for row in kept["rows"]:
        group = [launch for launch, _ in launches(layers[row["layer"]], row["batch"], row["kernel"])]
        us = row_us(group, usages, FITTED)
        assert us == pytest.approx(row["predicted"], rel=0.02, abs=0.1)
        if abs(us / row["us"] - 1) > WITHIN:
            off.append(row)
    assert len(kept["rows"]) - len(off) >= 110
    assert all(row["us"] < 25 for row in off)
    assert {row["kernel"] for row in kept["rows"]} == set(ROWS)
    assert all(
        FITTED.__getattribute__(name) == pytest.approx(kept["constants"][name], rel=0.01) for name in asdict(FITTED)
    )


def usage(loop: Loop | None, registers: int = 128) -> Usage:
    return Usage("linear", "sm_90", registers, 0, 100 * 1024, "wgmma.mma_async x 4", loop)


def test_a_loop_that_waits_takes_its_products_and_its_instructions() -> None:
    """By hand: 132 tiles of 10 turns on as many multiprocessors."""
    launch = Launch("linear", 128 * 132, 128, 10, 128, 128, 128, 8, 0)
    constants = Constants(2.0, 1.0, 30.0, 1000.0, 7.0, 45.0)
    waits = Loop(products=4, in_flight=0, stores=0, conversions=50, barriers=2, others=94)
    tensor, issue = 128 * 128 * 128 / 4096, (2.0 * 100 + 50) * 8 / 4
    assert predicted(launch, usage(waits), constants) == pytest.approx((10 * (tensor + issue + 30) + 1000) / 1755)
    flows = Loop(products=4, in_flight=1, stores=0, conversions=50, barriers=2, others=94)
    assert predicted(launch, usage(flows), constants) == pytest.approx((10 * max(tensor, issue) + 1000) / 1755)


def test_bytes_and_scattered_values_limit_a_launch() -> None:
    constants = Constants(2.0, 1.0, 30.0, 1000.0, 7.0, 45.0)
    launch = Launch("linear", 8, 8, 1, 16, 64, 64, 4, 270_000_000, 60_000)
    assert predicted(launch, usage(None), constants) == pytest.approx(100 + 1)
