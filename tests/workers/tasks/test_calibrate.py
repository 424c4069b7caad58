from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quant_core.diffusion.calibration import CalibrationSet
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
Seeds = Callable[..., dict[str, Any]]


def calibrate(run_task: RunTask, digits: str, params: dict[str, Any]) -> str:
    return run_task("calibrate", params, {"model": [digits]}).outputs["calibration"]


def test_shards_make_one_calibration_set(run_task: RunTask, task_store: NodeStore, digits: str, seeds: Seeds) -> None:
    digests = [calibrate(run_task, digits, seeds(first, 2) | {"steps": None}) for first in (10, 12)]
    whole = CalibrationSet([task_store.local_path(calibrate(run_task, digits, seeds(10, 4) | {"steps": None}))])
    parts = CalibrationSet([task_store.local_path(digest) for digest in digests])
    assert (parts.steps, parts.samples) == (3, 4)
    for one, two in zip(whole.by_step(4), parts.by_step(4), strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.conditioning["class_labels"], two.conditioning["class_labels"])


def test_calibrate_records_the_steps_that_are_asked_for(
    run_task: RunTask, task_store: NodeStore, digits: str, seeds: Seeds
) -> None:
    digest = calibrate(run_task, digits, seeds(0, 1) | {"steps": 2})
    assert CalibrationSet([task_store.local_path(digest)]).step_index.tolist() == [0, 2]


def test_calibrate_gives_the_same_bytes_again(run_task: RunTask, digits: str, seeds: Seeds) -> None:
    digests = {calibrate(run_task, digits, seeds(first, 2) | {"steps": None}) for first in (5, 5, 6)}
    assert len(digests) == 2
