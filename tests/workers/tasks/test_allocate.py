from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from quant_core.fit.unit_state import UnitState
from quant_core.methods.mpqdm.layer_errors import from_bytes
from workers.errors import TaskError
from workers.execution.context import TaskOutput
from workers.execution.execute import TaskCall, execute_call
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]


@pytest.fixture(scope="module")
def errors(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    digits_units: list[dict[str, Any]],
    common: dict[str, Any],
) -> Callable[..., TaskOutput]:
    """Measure the layers of some of the digits model's units."""

    def run(pick: slice, **params: Any) -> TaskOutput:
        units = digits_units[pick]
        names = [name for unit in units for name in unit["layers"]]
        settings = {"seed": 0, "forward_batch_size": 4, "samples": 2, "positions": 4} | params
        inputs = {"model": [digits], "calibration": calibration_digits}
        return run_task("channel_errors", {"units": units, "layers": names, **settings}, inputs)

    return run


@pytest.fixture(scope="module")
def allocation(run_task: RunTask, errors: Callable[..., TaskOutput]) -> Callable[..., TaskOutput]:
    """Choose the bits of the channels of six units."""
    measured = [errors(slice(2, 5)).outputs["errors"], errors(slice(5, 8)).outputs["errors"]]

    def run(method: str, extra: float = 0.0) -> TaskOutput:
        return run_task("allocate", {"method": method, "extra": extra}, {"errors": measured})

    return run


def test_a_layer_is_measured_the_same_whatever_is_beside_it(
    errors: Callable[..., TaskOutput], task_store: NodeStore
) -> None:
    together, alone = (
        from_bytes(task_store.get_bytes(errors(s).outputs["errors"])) for s in (slice(2, 5), slice(3, 4))
    )
    assert alone.keys() < together.keys()
    for name, layer in alone.items():
        assert torch.equal(layer.errors, together[name].errors)
        assert layer.effect == together[name].effect > 0
        least, middle, most = layer.errors.sum(dim=0).tolist()
        assert least > middle > most, "more bits, less error"


def test_uniform_bits_are_no_choice(task_store: NodeStore, tmp_path: Path) -> None:
    params, inputs = {"method": "uniform", "extra": 0.0}, {"errors": ["0" * 64]}
    with pytest.raises(TaskError, match="task allocate: method: got uniform, which leaves nothing to choose"):
        execute_call(TaskCall("allocate", params, inputs, task_store.url, str(tmp_path)))


@pytest.mark.parametrize("method", ["kurtosis", "global"])
def test_the_mean_is_kept(method: str, allocation: Callable[..., TaskOutput], task_store: NodeStore) -> None:
    made = allocation(method)
    bits = load(task_store.get_bytes(made.outputs["allocation"]))
    assert made.metrics["mean"] <= 4.0
    if method == "kurtosis":
        assert all(int(each.sum()) == 4 * len(each) for each in bits.values())
        assert made.metrics["mean"] == 4.0
    assert any(len(set(each.tolist())) > 1 for each in bits.values()), "some layer is mixed"
    plus = allocation(method, 0.1)
    assert 4.05 < plus.metrics["mean"] <= 4.11


def test_rounding_packs_what_was_allocated(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    digits_units: list[dict[str, Any]],
    common: dict[str, Any],
    allocation: Callable[..., TaskOutput],
    task_store: NodeStore,
) -> None:
    digest = allocation("kurtosis", 0.1).outputs["allocation"]
    bits = load(task_store.get_bytes(digest))
    units = copy.deepcopy(digits_units[2:5])
    for unit in units:
        for layer in unit["layers"].values():
            layer["allocated"] = True
    inputs = {"model": [digits], "calibration": calibration_digits, "allocation": [digest]}
    made = run_task("round", {"units": units, "method": "nearest"} | common, inputs)
    for unit in units:
        state = UnitState.from_bytes(task_store.get_bytes(made.outputs[f"state:{unit['unit']}"]))
        for name, spec in state.formats.layers.items():
            assert spec.weight.bits_mean == pytest.approx(float(bits[name].float().mean()))
            assert torch.equal(state.tensors[f"{name}.channel_bits"], bits[name])
