from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from workers.errors import TaskError
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]


def test_inspect_describes_the_model(run_task: RunTask, task_store: NodeStore, digits: str) -> None:
    output = run_task("inspect", {}, {"model": [digits]})
    inspection = output.metrics["inspection"]
    assert json.loads(task_store.get_bytes(output.outputs["inspection"])) == inspection
    assert inspection["class_name"] == "UNet2DModel"
    assert inspection["conditioning"] == {"class_labels": 10}
    assert inspection["sample_shape"] == [1, 16, 16]
    assert [unit["name"] for unit in inspection["units"]][:2] == ["time_embedding", "conv_in"]


def test_inspect_gives_the_same_bytes_again(run_task: RunTask, digits: str) -> None:
    one, two = (run_task("inspect", {}, {"model": [digits]}).outputs for _ in range(2))
    assert one == two


def test_inspect_wants_one_model(run_task: RunTask) -> None:
    with pytest.raises(TaskError, match="task inspect: input model: got none, wanted it"):
        run_task("inspect", {}, {})
