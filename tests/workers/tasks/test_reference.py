from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file

from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]


def test_reference_holds_samples_and_some_trajectories(task_store: NodeStore, reference_digits: list[str]) -> None:
    first, second = (load_file(task_store.local_path(digest)) for digest in reference_digits)
    assert first["sample"].shape == (3, 1, 16, 16)
    assert float(first["sample"].abs().max()) <= 1.0 + 1e-6
    assert first["x"].shape == first["prediction"].shape == (3, 2, 1, 16, 16)
    assert first["conditioning.class_labels"].shape == (3,)
    assert "x" not in second
    assert second["sample"].shape == (1, 1, 16, 16)


def test_reference_gives_the_same_bytes_again(
    run_task: RunTask, digits: str, seeds: Callable[..., dict[str, Any]], reference_digits: list[str]
) -> None:
    again = run_task("reference", seeds(0, 3) | {"sqnr_seeds": 2}, {"model": [digits]})
    assert again.outputs["reference"] == reference_digits[0]
    assert again.metrics["seconds"] > 0
