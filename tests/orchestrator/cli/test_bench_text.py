"""The table that `quantmill bench` prints."""

from __future__ import annotations

from typing import Any

from orchestrator.cli.bench import bench_text

FIGURES = {
    "step_ms": {"1": 2.0},
    "eager_step_ms": {"1": 8.0},
    "images_per_second": 3.0,
    "peak_memory_bytes": 3 << 20,
    "bytes": 1 << 20,
}
FOUND: dict[str, Any] = {
    "release": "small@1",
    "device": "H100",
    "threads": 4,
    "backend": "triton",
    "layers": {"triton": 7},
    "way": "CUDA graph",
    "compiled_way": "by block",
    "release_figures": FIGURES,
    "original_figures": FIGURES,
    "bf16_figures": FIGURES,
    "bf16_compiled_figures": FIGURES | {"eager_step_ms": None, "peak_memory_bytes": None},
}


def test_graphs_and_calls_without_one_are_told_apart() -> None:
    head, _, *rows = bench_text(FOUND).splitlines()
    assert head.endswith("triton backend (7 layers triton), called from CUDA graphs, compiled by repeated block")
    assert [row.split() for row in rows[1:3]] == [
        ["one", "step,", "batch", "1", "2.00", "ms", "2.00", "ms", "2.00", "ms", "2.00", "ms"],
        ["one", "step,", "batch", "1,", "without", "a", "graph", "8.00", "ms", "8.00", "ms", "8.00", "ms", "-"],
    ]


def test_without_a_graph_there_is_one_time() -> None:
    sides = ("release_figures", "original_figures", "bf16_figures")
    eager = FOUND | {side: FIGURES | {"eager_step_ms": None} for side in sides}
    text = bench_text(eager | {"way": "eager", "compiled_way": None, "bf16_compiled_figures": None})
    assert text.splitlines()[0].endswith("triton backend (7 layers triton)")
    assert "graph" not in text
