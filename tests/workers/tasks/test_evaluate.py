from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_core.metrics.psnr import psnr_per_sample
from quant_core.metrics.sqnr import sqnr_db
from quant_spec.enums import SampleSpace
from quant_spec.errors import QuantizationError
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
Seeds = Callable[..., dict[str, Any]]


def test_evaluate_compares_with_the_reference(
    task_store: NodeStore, reference_digits: list[str], evaluated_digits: list[TaskOutput]
) -> None:
    reference = load_file(task_store.local_path(reference_digits[0]))
    found = load_file(task_store.local_path(evaluated_digits[0].outputs["evaluation"]))
    assert torch.equal(found["psnr_db"], psnr_per_sample(reference["sample"], found["sample"], SampleSpace.PIXELS))
    # 4-bit weights: far from equal, far from unrelated
    assert 10 < float(found["psnr_db"].mean()) < 60
    assert found["power"].shape == (2, 3)
    torch.testing.assert_close(found["power"][0], reference["prediction"].double().square().flatten(1).sum(1))
    assert all(5 < value < 60 for value in sqnr_db(*found["power"].tolist()))
    metrics = evaluated_digits[0].metrics
    assert metrics["n"] == 3
    assert metrics["psnr_db"] == pytest.approx(float(found["psnr_db"].mean()), abs=1e-5)


def test_evaluate_does_not_clamp_latents(
    run_task: RunTask, seeds: Seeds, task_store: NodeStore, packed_digits: str, reference_digits: list[str]
) -> None:
    inputs = {"packed": [packed_digits], "reference": [reference_digits[0]]}
    output = run_task("evaluate", seeds(0, 3) | {"samples": "latents"}, inputs)
    reference = load_file(task_store.local_path(reference_digits[0]))
    found = load_file(task_store.local_path(output.outputs["evaluation"]))
    assert torch.equal(found["psnr_db"], psnr_per_sample(reference["sample"], found["sample"], SampleSpace.LATENTS))
    assert not torch.equal(found["psnr_db"], psnr_per_sample(reference["sample"], found["sample"], SampleSpace.PIXELS))


def test_evaluate_without_a_trajectory(task_store: NodeStore, evaluated_digits: list[TaskOutput]) -> None:
    found = load_file(task_store.local_path(evaluated_digits[1].outputs["evaluation"]))
    assert "power" not in found
    assert found["sample"].shape == (1, 1, 16, 16)


def test_evaluate_gives_the_same_bytes_again(
    run_task: RunTask,
    seeds: Seeds,
    packed_digits: str,
    reference_digits: list[str],
    evaluated_digits: list[TaskOutput],
) -> None:
    inputs = {"packed": [packed_digits], "reference": [reference_digits[0]]}
    again = run_task("evaluate", seeds(0, 3) | {"samples": "pixels"}, inputs)
    assert again.outputs == evaluated_digits[0].outputs


def test_evaluate_refuses_a_reference_of_another_trajectory(
    run_task: RunTask, seeds: Seeds, packed_digits: str, reference_digits: list[str]
) -> None:
    inputs = {"packed": [packed_digits], "reference": [reference_digits[0]]}
    params = seeds(0, 3) | {"samples": "pixels"}
    longer = params | {"sampler": params["sampler"] | {"num_inference_steps": 4}}
    with pytest.raises(QuantizationError, match=r"got timesteps 666 to 0 in 3 steps, wanted .* 750 to 0 in 4 steps"):
        run_task("evaluate", longer, inputs)
    with pytest.raises(QuantizationError, match="got samples of 3 seeds, wanted 2"):
        run_task("evaluate", seeds(0, 2) | {"samples": "pixels"}, inputs)
