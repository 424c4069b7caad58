from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant_core.fit.unit_state import UnitState
from workers.errors import TaskError
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
UNIT = "mid_block.resnets.0"
PASS = {
    "inputs": "fp",
    "start": "nearest",
    "iterations": 60,
    "batch_size": 6,
    "lr": 0.1,
    "trust": 0.0,
    "learn_activation_scales": False,
    "rounding_weight": 10.0,
    "warmup": 0.0,
    "beta": [4.0, 2.0],
}


@pytest.fixture
def reconstruct(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    rounded_digits: dict[str, str],
    common: dict[str, Any],
) -> Callable[..., TaskOutput]:
    """Reconstruct one unit of the digits model; with quantized inputs, behind all units before it as rounded."""

    def run(**params: Any) -> TaskOutput:
        chosen = PASS | common | {"cache_bytes": 1 << 28} | params
        inputs = {"model": [digits], "calibration": calibration_digits, "state": [rounded_digits[UNIT]]}
        if chosen["inputs"] == "quantized":
            names = list(rounded_digits)
            inputs["earlier"] = [rounded_digits[name] for name in names[: names.index(UNIT)]]
        return run_task("reconstruct", chosen, inputs)

    return run


def test_it_improves_the_unit(
    reconstruct: Callable[..., TaskOutput], task_store: NodeStore, rounded_digits: dict[str, str]
) -> None:
    made = reconstruct()
    assert made.metrics["unit"] == UNIT
    assert made.metrics["sqnr_db_after"] > made.metrics["sqnr_db_before"] + 1
    before, after = (
        UnitState.from_bytes(task_store.get_bytes(digest)) for digest in (rounded_digits[UNIT], made.outputs["state"])
    )
    assert (after.formats, after.timesteps) == (before.formats, before.timesteps)
    changed = {name for name in after.tensors if not torch.equal(after.tensors[name], before.tensors[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"qweight"}


def test_the_same_again_gives_the_same_digest(reconstruct: Callable[..., TaskOutput]) -> None:
    assert reconstruct().outputs == reconstruct().outputs


def test_the_passs_parameters_reach_it(reconstruct: Callable[..., TaskOutput]) -> None:
    few = {"iterations": 20}
    usual = reconstruct(**few).outputs["state"]
    others: dict[str, Any] = {
        "iterations": 10,
        "batch_size": 3,
        "lr": 0.02,
        "trust": 0.3,
        "rounding_weight": 1.0,
        "warmup": 0.5,
        "beta": [20.0, 2.0],
        "seed": 1,
        "inputs": "quantized",
    }
    for name, value in others.items():
        assert reconstruct(**few | {name: value}).outputs["state"] != usual, name
    nearest, from_round = (reconstruct(iterations=1, start=start) for start in ("nearest", "round"))
    assert from_round.metrics["sqnr_db_before"] > nearest.metrics["sqnr_db_before"]


def test_learned_scales_are_in_the_state(
    reconstruct: Callable[..., TaskOutput], task_store: NodeStore, rounded_digits: dict[str, str]
) -> None:
    made = reconstruct(learn_activation_scales=True, activation_lr=1e-3)
    before, after = (
        UnitState.from_bytes(task_store.get_bytes(digest)) for digest in (rounded_digits[UNIT], made.outputs["state"])
    )
    scales = [name for name in before.tensors if name.endswith("act_quantizers.0.scale")]
    assert scales
    assert all(not torch.equal(after.tensors[name], before.tensors[name]) for name in scales)


def test_little_memory_will_do(reconstruct: Callable[..., TaskOutput]) -> None:
    plenty, little = (reconstruct(cache_bytes=size).metrics["sqnr_db_after"] for size in (1 << 28, 1000))
    assert little == pytest.approx(plenty, abs=0.5)


def test_one_state_is_wanted(
    run_task: RunTask, digits: str, calibration_digits: list[str], common: dict[str, Any]
) -> None:
    inputs = {"model": [digits], "calibration": calibration_digits, "state": []}
    with pytest.raises(TaskError, match="input state: got 0 digests, wanted 1"):
        run_task("reconstruct", PASS | common | {"cache_bytes": 1000}, inputs)
