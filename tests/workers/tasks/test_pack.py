from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_core
from quant_core.artifact.folder import SCHEDULER_FILE, WEIGHTS_FILE
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.sampler import make_scheduler, start
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.sampler import Sampler
from workers.execution.context import TaskOutput
from workers.storage.manifest import pull_tree
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"


@pytest.fixture
def packed(
    run_task: RunTask, digits: str, rounded_digits: dict[str, str], seeds: Callable[..., dict[str, Any]]
) -> TaskOutput:
    params = {"sampler": seeds(0, 1)["sampler"]}
    return run_task("pack", params, {"model": [digits], "states": list(rounded_digits.values())})


@pytest.fixture
def folder(packed: TaskOutput, task_store: NodeStore, tmp_path: Path) -> Path:
    pull_tree(task_store, packed.outputs["packed"], tmp_path / "packed")
    return tmp_path / "packed"


def test_loaded_equals_simulated(
    folder: Path, task_store: NodeStore, rounded_digits: dict[str, str], calibration_digits: list[str]
) -> None:
    states = [UnitState.from_bytes(task_store.get_bytes(digest)) for digest in rounded_digits.values()]
    simulated = load_denoiser(DIGITS).model
    build_quantized(simulated, merge_formats(states))
    load_states(simulated, states)
    floats, loaded = load_denoiser(DIGITS).model, quant_core.load_quantized(folder, backend="reference")
    calibration = CalibrationSet([task_store.local_path(digest) for digest in calibration_digits])
    with torch.no_grad():
        for batch in calibration.by_step(3):
            got, wanted, exact = (replay(model, batch) for model in (loaded, simulated, floats))
            assert torch.equal(got, wanted)
            assert 0.001 < float((got - exact).norm() / exact.norm()) < 0.3


def test_the_file_is_small(packed: TaskOutput, folder: Path) -> None:
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert packed.metrics["bytes"] == size
    weights = sum(parameter.numel() for parameter in load_denoiser(DIGITS).model.parameters())
    # 4 bits a weight; biases, norms, tables and the names of it all are the rest of so small a model
    assert weights / 2 < size < 0.25 * 4 * weights


def test_the_folder_has_the_sampler_that_was_calibrated(folder: Path, seeds: Callable[..., dict[str, Any]]) -> None:
    config = json.loads((folder / SCHEDULER_FILE).read_text())
    assert config["_class_name"] == "DDIMScheduler"
    spec = Sampler(**seeds(0, 1)["sampler"])
    timesteps = start(make_scheduler(Sampler(num_inference_steps=spec.num_inference_steps), config), spec, (1, 16, 16))
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["timesteps"]
    assert stored == timesteps.tolist()


def test_the_same_again_gives_the_same_digest(
    packed: TaskOutput,
    run_task: RunTask,
    digits: str,
    rounded_digits: dict[str, str],
    seeds: Callable[..., dict[str, Any]],
) -> None:
    params = {"sampler": seeds(0, 1)["sampler"]}
    states = list(rounded_digits.values())
    assert run_task("pack", params, {"model": [digits], "states": states}).outputs == packed.outputs
    fewer = run_task("pack", params, {"model": [digits], "states": states[:-1]})
    assert fewer.outputs != packed.outputs
    assert fewer.metrics["bytes"] > packed.metrics["bytes"]  # the last unit stays in full precision
