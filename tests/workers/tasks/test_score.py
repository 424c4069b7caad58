from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file

from quant_core.artifact.card import check_metrics
from quant_core.metrics.psnr import mean_with_ci
from workers.errors import TaskError
from workers.execution.context import TaskOutput
from workers.storage.manifest import read_manifest
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]


@pytest.fixture(scope="module")
def parameters(seeds: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    shared = seeds(0, 4)
    return {
        "sampler": shared["sampler"],
        "seeds": shared["seeds"],
        "sqnr_seeds": 2,
        "extractor": "efficientnet-lite0",
        "grid": 3,
        "samples": "pixels",
    }


@pytest.fixture(scope="module")
def inputs(
    digits: str, packed_digits: str, reference_digits: list[str], evaluated_digits: list[TaskOutput]
) -> dict[str, list[str]]:
    return {
        "packed": [packed_digits],
        "model": [digits],
        "references": reference_digits,
        "evaluations": [output.outputs["evaluation"] for output in evaluated_digits],
    }


@pytest.fixture(scope="module")
def scored(run_task: RunTask, parameters: dict[str, Any], inputs: dict[str, list[str]]) -> TaskOutput:
    return run_task("score", parameters, inputs)


def test_score_gives_every_figure_with_its_protocol(
    scored: TaskOutput, task_store: NodeStore, parameters: dict[str, Any], inputs: dict[str, list[str]]
) -> None:
    metrics = scored.metrics["metrics"]
    assert json.loads(task_store.get_bytes(scored.outputs["score"])) == metrics
    check_metrics(metrics)
    values = torch.cat([load_file(task_store.local_path(digest))["psnr_db"] for digest in inputs["evaluations"]])
    expected = mean_with_ci(values.tolist())
    assert metrics["psnr_db"] == pytest.approx(expected.value, abs=1e-5)
    assert metrics["psnr_db_ci95"] == pytest.approx(expected.ci95, abs=1e-5)
    assert metrics["n"] == 4
    assert metrics["fd"] > 0
    assert metrics["fd_extractor"] == "efficientnet-lite0-imagenet@224"
    assert len(metrics["sqnr_db_per_step"]) == len(metrics["timesteps"]) == 3
    assert metrics["timesteps"] == [666, 333, 0]
    assert metrics["sampler"] == parameters["sampler"]
    assert metrics["seeds"] == parameters["seeds"]


def test_score_counts_what_the_packed_model_costs(
    run_task: RunTask, scored: TaskOutput, task_store: NodeStore, inputs: dict[str, list[str]]
) -> None:
    metrics = scored.metrics["metrics"]
    files = read_manifest(task_store, inputs["packed"][0])["files"]
    assert metrics["weight_bits_mean"] == 4
    assert metrics["act_bits_mean"] == 32
    assert metrics["bytes"] == files["diffusion_pytorch_model.safetensors"]["bytes"]
    assert metrics["bytes"] < 0.6 * metrics["bytes_fp16"]
    inspection = run_task("inspect", {}, {"model": inputs["model"]}).metrics["inspection"]
    layers, attentions = (sum(part["macs"] for part in inspection[key].values()) for key in ("layers", "attentions"))
    assert metrics["bops"] == layers * 4 * 32 + attentions * 32 * 32  # attention stays in full precision
    assert metrics["bops_fp32"] == (layers + attentions) * 32 * 32


def test_score_shows_the_first_seeds(scored: TaskOutput, task_store: NodeStore, inputs: dict[str, list[str]]) -> None:
    images = load(task_store.get_bytes(scored.outputs["samples"]))
    first = load_file(task_store.local_path(inputs["references"][0]))["sample"]
    assert torch.equal(images["reference"], first.clamp(-1, 1).expand(-1, 3, -1, -1))
    assert images["quantized"].shape == (3, 3, 16, 16)
    with Image.open(io.BytesIO(task_store.get_bytes(scored.outputs["grid"]))) as picture:
        # three columns and rows of 16 pixels, enlarged fourfold, with gaps of 2
        assert picture.size == (3 * 66 - 2, 3 * 66 - 2)
        assert picture.mode == "RGB"


def test_score_gives_the_same_bytes_again(
    run_task: RunTask, scored: TaskOutput, parameters: dict[str, Any], inputs: dict[str, list[str]]
) -> None:
    assert run_task("score", parameters, inputs).outputs == scored.outputs


def test_score_refuses_what_does_not_fit(
    run_task: RunTask, parameters: dict[str, Any], inputs: dict[str, list[str]]
) -> None:
    with pytest.raises(TaskError, match="got 1 references, 2 evaluations, wanted pairs"):
        run_task("score", parameters, inputs | {"references": inputs["references"][:1]})
    with pytest.raises(TaskError, match="input extractor_weights: got none with inception-v3, wanted its file"):
        run_task("score", parameters | {"extractor": "inception-v3"}, inputs)


def test_score_of_latents_shows_them_in_their_own_range(
    run_task: RunTask,
    task_store: NodeStore,
    scored: TaskOutput,
    parameters: dict[str, Any],
    inputs: dict[str, list[str]],
) -> None:
    latents = run_task("score", parameters | {"samples": "latents"}, inputs)
    assert scored.metrics["metrics"]["samples"] == "pixels"
    assert latents.metrics["metrics"]["samples"] == "latents"
    assert latents.metrics["metrics"]["fd"] != scored.metrics["metrics"]["fd"]
    shown, truth = load(task_store.get_bytes(latents.outputs["samples"])), inputs["references"]
    samples = torch.cat([load_file(task_store.local_path(digest))["sample"] for digest in truth])
    low, high = samples.min(), samples.max()
    expected = (samples[:3] - low) / (high - low) * 2 - 1
    torch.testing.assert_close(shown["reference"], expected.expand(-1, 3, -1, -1))
