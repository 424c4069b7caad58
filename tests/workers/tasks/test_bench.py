"""The benchmark of a release against its original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RunTask = Callable[..., Any]


def test_bench_measures_both_models(
    run_task: RunTask, digits: str, packed_digits: str, seeds: Callable[..., dict[str, Any]]
) -> None:
    params = {"sampler": seeds(0, 1)["sampler"], "batches": [1, 4], "seconds": 0.05}
    metrics = run_task("bench", params, {"artifact": [packed_digits], "model": [digits]}).metrics
    assert (metrics["threads"], metrics["backend"]) == (1, "reference")
    assert metrics["device"]
    for side in ("release_figures", "original_figures"):
        figures = metrics[side]
        assert set(figures["step_ms"]) == {"1", "4"}
        assert all(0 < value < 10_000 for value in figures["step_ms"].values())
        assert figures["images_per_second"] > 0
        # Loading alone takes the weights; a small model's call takes a few times as much.
        assert figures["peak_memory_bytes"] > figures["bytes"] / 2
    assert metrics["release_figures"]["bytes"] < metrics["original_figures"]["bytes"] / 4
