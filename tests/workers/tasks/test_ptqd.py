"""The tasks of PTQD on the digits model: noise, correct, step_effects, step_bits, and what others make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quant_core
from quant_core.artifact.folder import SCHEDULER_FILE
from quant_core.diffusion.conditioning import draw_conditioning
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.metrics.sqnr import sqnr_db
from quant_core.nn.layers import QuantLayer
from quant_spec.errors import QuantizationError
from workers.execution.context import TaskOutput
from workers.storage.manifest import pull_tree
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
Seeds = Callable[..., dict[str, Any]]
PARTS = {"scale": True, "bias": True, "variance": True, "least_r2": 0.0, "held_out": True}
FIT = PARTS | {"unknown_timestep": "error", "channel_dim": 1}


@pytest.fixture(scope="module")
def measure(run_task: RunTask, seeds: Seeds, digits: str, packed_digits: str) -> Callable[[int, int], str]:
    """Measure the noise of the packed digits model on some seeds; returns the digest."""

    def run(first: int, count: int) -> str:
        reference = run_task("reference", seeds(first, count) | {"sqnr_seeds": count}, {"model": [digits]})
        inputs = {"packed": [packed_digits], "reference": [reference.outputs["reference"]]}
        params = {name: seeds(first, count)[name] for name in ("sampler", "batch_size")}
        return run_task("noise", params, inputs).outputs["noise"]

    return run


@pytest.fixture(scope="module")
def corrected(run_task: RunTask, packed_digits: str, measure: Callable[[int, int], str]) -> TaskOutput:
    inputs = {"packed": [packed_digits], "noise": [measure(200, 6), measure(206, 6)], "held_out": [measure(212, 8)]}
    return run_task("correct", FIT, inputs)


def test_noise_of_shards_adds_up_to_the_whole(
    run_task: RunTask, packed_digits: str, measure: Callable[[int, int], str], task_store: NodeStore
) -> None:
    held_out = [measure(212, 8)]

    def fit(shards: list[str]) -> Any:
        made = run_task("correct", FIT, {"packed": [packed_digits], "noise": shards, "held_out": held_out})
        return made.outputs["packed"], made.metrics["steps"]

    whole = fit([measure(200, 12)])[1]
    parts = [measure(200, 2), measure(202, 6), measure(208, 4)]
    sharded = fit(parts)[1]
    for one, other in zip(whole, sharded, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert fit(parts) == fit(parts[::-1])


def test_correct_changes_the_scheduler_alone(
    corrected: TaskOutput, packed_digits: str, task_store: NodeStore, tmp_path: Path
) -> None:
    pull_tree(task_store, packed_digits, tmp_path / "before")
    pull_tree(task_store, corrected.outputs["packed"], tmp_path / "after")
    before, after = (
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
            if path.name != "manifest.json"
        }
        for name in ("before", "after")
    )
    assert {name for name in before if before[name] != after[name]} == {SCHEDULER_FILE}
    assert set(before) == set(after)
    config, plain = json.loads(after[SCHEDULER_FILE]), json.loads(before[SCHEDULER_FILE])
    assert config["_class_name"] == "QuantmillCorrectedScheduler"
    assert config["wrapped_class"] == plain["_class_name"] == "DDIMScheduler"
    ours = {"_class_name", "_diffusers_version", "correction", "wrapped_class", "_use_default_values"}
    assert {key: config[key] for key in plain if key not in ours} == {k: v for k, v in plain.items() if k not in ours}


def test_what_is_used_lowers_the_held_out_error(corrected: TaskOutput) -> None:
    steps = corrected.metrics["steps"]
    assert [step["timestep"] for step in steps] == [666, 333, 0]
    assert any(step["uses_k"] or step["uses_bias"] for step in steps)
    for step in steps:
        used = step["uses_k"] or step["uses_bias"]
        assert (step["mse_after"] < step["mse_before"]) is used
    assert corrected.metrics["mse_after"] < corrected.metrics["mse_before"]


def test_evaluation_samples_as_a_user_does(
    run_task: RunTask,
    seeds: Seeds,
    corrected: TaskOutput,
    reference_digits: list[str],
    evaluated_digits: list[TaskOutput],
    task_store: NodeStore,
    tmp_path: Path,
) -> None:
    inputs = {"packed": [corrected.outputs["packed"]], "reference": [reference_digits[0]]}
    made = run_task("evaluate", seeds(0, 3, 3) | {"samples": "pixels"}, inputs)
    found = load_file(task_store.local_path(made.outputs["evaluation"]))
    pull_tree(task_store, corrected.outputs["packed"], tmp_path / "packed")
    unet = quant_core.load_quantized(tmp_path / "packed", backend="reference")
    scheduler = quant_core.QuantmillCorrectedScheduler.from_pretrained(tmp_path / "packed", subfolder="scheduler")
    scheduler.set_timesteps(3)
    x = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    told = draw_conditioning(unet, range(3), None)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(call_denoiser(unet, x, timestep, told), timestep, x).prev_sample
    assert torch.equal(found["sample"], x)
    plain = load_file(task_store.local_path(evaluated_digits[0].outputs["evaluation"]))
    assert not torch.equal(found["sample"], plain["sample"])
    # the recorded error is that of the corrected predictions
    assert torch.equal(found["power"][0], plain["power"][0])
    assert sum(sqnr_db(*found["power"].tolist())) > sum(sqnr_db(*plain["power"].tolist()))


# --- bits by step


@pytest.fixture(scope="module")
def varied(digits_units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The units with activation bits left to the choice by step, but for the first convolution."""
    units = json.loads(json.dumps(digits_units))
    for unit in units:
        for name, layer in unit["layers"].items():
            layer["activation"] = layer["activation"] | ({} if name == "conv_in" else {"bits": None})
    return units


@pytest.fixture(scope="module")
def step_bits(
    run_task: RunTask, seeds: Seeds, digits: str, calibration_digits: list[str], varied: list[dict[str, Any]]
) -> TaskOutput:
    layers = {
        name: {"symmetric": False, "range": layer["activation_range"], "split": layer["split"]}
        for unit in varied
        for name, layer in unit["layers"].items()
        if layer["activation"]["bits"] is None
    }
    params = {"choices": [4, 8], "layers": layers, "seed": 0}
    inputs = {"model": [digits], "calibration": calibration_digits}
    shards = [run_task("step_effects", seeds(first, 2) | params, inputs).outputs["effects"] for first in (300, 302)]
    config = {"method": "joint", "target_mean": 5.4}
    return run_task("step_bits", config, {"effects": shards})


@pytest.fixture(scope="module")
def mixed(
    run_task: RunTask,
    seeds: Seeds,
    digits: str,
    calibration_digits: list[str],
    varied: list[dict[str, Any]],
    common: dict[str, Any],
    step_bits: TaskOutput,
) -> str:
    inputs = {"model": [digits], "calibration": calibration_digits, "step_bits": [step_bits.outputs["step_bits"]]}
    made = run_task("round", {"units": varied, "method": "nearest"} | common, inputs)
    params = {"sampler": seeds(0, 1)["sampler"]}
    return run_task("pack", params, {"model": [digits], "states": list(made.outputs.values())}).outputs["packed"]


def test_the_bits_are_within_the_mean(step_bits: TaskOutput, task_store: NodeStore) -> None:
    table = json.loads(task_store.get_bytes(step_bits.outputs["step_bits"]))
    assert sorted(table["bits"]) == [4, 4, 8]
    assert step_bits.metrics["bits"] == table["bits"]
    assert step_bits.metrics["mean"] == pytest.approx(16 / 3, abs=1e-6)


def test_a_packed_model_has_the_bits_of_each_step(
    mixed: str, step_bits: TaskOutput, task_store: NodeStore, tmp_path: Path
) -> None:
    pull_tree(task_store, mixed, tmp_path / "packed")
    unet = quant_core.load_quantized(tmp_path / "packed", backend="reference")
    bits = tuple(step_bits.metrics["bits"])
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, QuantLayer)}
    assert layers.pop("conv_in").act_quantizers[0].spec.step_bits == ()
    assert {quantizer.spec.step_bits for layer in layers.values() for quantizer in layer.act_quantizers} == {bits}
    levels: dict[str, list[int]] = {}

    def count(name: str, quantizer: Any) -> None:
        def hook(_: Any, args: Any, out: Tensor) -> None:
            levels.setdefault(name, []).append(out.unique().numel())

        quantizer.register_forward_hook(hook)

    for name, layer in layers.items():
        count(name, layer.act_quantizers[0])
    x, timesteps = torch.randn(4, 1, 16, 16), torch.tensor([666, 333, 0])
    told = {name: value[:1].expand(4) for name, value in draw_conditioning(unet, [0], None).items()}
    with torch.no_grad():
        each = [call_denoiser(unet, x, timestep, told) for timestep in timesteps]
        for counts in levels.values():
            assert all(found <= 2**wanted for found, wanted in zip(counts, bits, strict=True))
        assert any(max(counts) > 16 for counts in levels.values())
        mixed_batch = call_denoiser(unet, x, torch.tensor([333, 0, 666, 333]), told)
        for row, step in enumerate((1, 2, 0, 1)):
            assert torch.equal(mixed_batch[row], each[step][row])


def test_round_needs_the_bits_that_its_formats_leave_open(
    run_task: RunTask, digits: str, calibration_digits: list[str], varied: list[dict[str, Any]], common: dict[str, Any]
) -> None:
    inputs = {"model": [digits], "calibration": calibration_digits}
    with pytest.raises(QuantizationError, match="got null bits, wanted a number"):
        run_task("round", {"units": varied[4:5], "method": "nearest"} | common, inputs)


def test_score_counts_bit_operations_by_step(
    run_task: RunTask, seeds: Seeds, digits: str, mixed: str, step_bits: TaskOutput, reference_digits: list[str]
) -> None:
    evaluated = [
        run_task("evaluate", seeds(*shard) | {"samples": "pixels"}, {"packed": [mixed], "reference": [digest]})
        for shard, digest in zip([(0, 3), (3, 1)], reference_digits, strict=True)
    ]
    params = {
        "sampler": seeds(0, 4)["sampler"],
        "seeds": {"first": 0, "count": 4},
        "sqnr_seeds": 2,
        "extractor": "efficientnet-lite0",
        "grid": 2,
        "samples": "pixels",
    }
    inputs = {
        "packed": [mixed],
        "references": reference_digits,
        "evaluations": [made.outputs["evaluation"] for made in evaluated],
        "model": [digits],
    }
    metrics = run_task("score", params, inputs).metrics["metrics"]
    per_step, bits = metrics["bops_per_step"], step_bits.metrics["bits"]
    assert sum(per_step) / 3 == pytest.approx(metrics["bops"], rel=1e-6)
    assert [value > min(per_step) for value in per_step] == [each == 8 for each in bits]
    assert 4 < metrics["act_bits_mean"] < 8
