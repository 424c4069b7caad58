from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant_core
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.fit.unit_state import UnitState
from quant_core.inspect.inspection import inspect_model
from quant_spec.enums import UnknownTimestep
from workers.execution.context import TaskOutput
from workers.storage.manifest import pull_tree
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"
UNIT = "mid_block.resnets.0"
CLOSED = {"method": "closed_form", "damping": 0.001, "cache": False}
LEARNED = CLOSED | {
    "method": "reconstruct",
    "iterations": 10,
    "lr": 0.02,
    "trust": 0.9,
    "rounding_weight": 100.0,
    "warmup": 0.0,
    "beta": [4.0, 2.0],
}
TABLES = CLOSED | {"cache": True, "cache_ratio": 4.0}
LEARN = {
    "inputs": "fp",
    "start": "round",
    "iterations": 2,
    "batch_size": 6,
    "lr": 0.01,
    "trust": 0.5,
    "learn_activation_scales": False,
    "rounding_weight": 10.0,
    "warmup": 0.0,
    "beta": [4.0, 2.0],
}


@pytest.fixture(scope="session")
def block() -> list[str]:
    return list(inspect_model(load_denoiser(DIGITS))["temporal"])


@pytest.fixture(scope="session")
def temporal(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    digits_units: list[dict[str, Any]],
    block: list[str],
) -> Callable[[dict[str, Any]], TaskOutput]:
    """Return what quantizes the temporal block of the digits model."""
    layers = {name: spec for unit in digits_units for name, spec in unit["layers"].items() if name in block}

    def run(params: dict[str, Any]) -> TaskOutput:
        unit = {"unit": "@temporal", "layers": layers, "attentions": {}}
        return run_task("temporal", unit | params, {"model": [digits], "calibration": calibration_digits})

    return run


@pytest.fixture(scope="session")
def rest(digits_units: list[dict[str, Any]], block: list[str]) -> list[dict[str, Any]]:
    """The units without the block's layers, as the planner describes them."""
    units = [
        unit | {"layers": {name: spec for name, spec in unit["layers"].items() if name not in block}}
        for unit in digits_units
    ]
    return [unit for unit in units if unit["layers"] or unit["attentions"]]


def test_it_quantizes_the_block_and_says_what_became_of_it(
    temporal: Callable[[dict[str, Any]], TaskOutput], task_store: NodeStore, block: list[str]
) -> None:
    made = temporal(CLOSED)
    state = UnitState.from_bytes(task_store.get_bytes(made.outputs["state"]))
    assert set(state.formats.layers) == set(block)
    assert made.metrics["rows"] == 3 * 10
    assert set(made.metrics["features"]) == {name for name in block if name.endswith("time_emb_proj")}
    learned = temporal(LEARNED)
    nearest = temporal({"method": "nearest", "cache": False})
    noise = [
        sum(10 ** (-f["sqnr_db"] / 10) for f in task.metrics["features"].values()) for task in (learned, made, nearest)
    ]
    assert noise[0] <= noise[1] < noise[2]
    json.dumps(made.metrics)
    assert temporal(CLOSED).outputs == made.outputs


def test_units_are_learned_and_packed_around_its_tables(
    temporal: Callable[[dict[str, Any]], TaskOutput],
    run_task: RunTask,
    task_store: NodeStore,
    digits: str,
    calibration_digits: list[str],
    rest: list[dict[str, Any]],
    common: dict[str, Any],
    seeds: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    made = temporal(TABLES)
    assert made.metrics["unserved"] == ["time_embedding.linear_1", "time_embedding.linear_2"]
    model = {"model": [digits], "calibration": calibration_digits}
    rounded = run_task("round", {"units": rest, "method": "nearest"} | common, model).outputs
    inputs = {**model, "state": [rounded[f"state:{UNIT}"]], "temporal": [made.outputs["state"]]}
    learned = run_task("reconstruct", LEARN | common | {"cache_bytes": 1 << 28}, inputs)
    states = {**rounded, f"state:{UNIT}": learned.outputs["state"]}
    params = {"sampler": seeds(0, 1)["sampler"], "unknown_timestep": "nearest"}
    packed = run_task("pack", params, {"model": [digits], "states": [made.outputs["state"], *states.values()]})
    pull_tree(task_store, packed.outputs["packed"], tmp_path / "packed")

    plan = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert plan["unknown_timestep"] == UnknownTimestep.NEAREST
    assert plan["unserved"] == made.metrics["unserved"]
    assert set(plan["features"]) == set(made.metrics["features"])
    loaded, floats = quant_core.load_quantized(tmp_path / "packed", backend="reference"), load_denoiser(DIGITS).model
    calibration = CalibrationSet([task_store.local_path(digest) for digest in calibration_digits])
    with torch.no_grad():
        for batch in calibration.by_step(3):
            exact = replay(floats, batch)
            assert 0.001 < float((replay(loaded, batch) - exact).norm() / exact.norm()) < 0.5
