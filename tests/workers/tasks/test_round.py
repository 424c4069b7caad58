from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quant_core.fit.unit_state import UnitState
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]


@pytest.fixture
def round_units(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    digits_units: list[dict[str, Any]],
    common: dict[str, Any],
) -> Callable[..., TaskOutput]:
    """Round some of the digits model's units."""

    def run(pick: slice, **params: Any) -> TaskOutput:
        inputs = {"model": [digits], "calibration": calibration_digits}
        return run_task("round", {"units": digits_units[pick], "method": "nearest"} | common | params, inputs)

    return run


def test_one_state_for_each_unit(
    round_units: Callable[..., TaskOutput], task_store: NodeStore, digits_units: list[dict[str, Any]]
) -> None:
    made = round_units(slice(4, 7))
    assert list(made.outputs) == [f"state:{unit['unit']}" for unit in digits_units[4:7]]
    for unit in digits_units[4:7]:
        state = UnitState.from_bytes(task_store.get_bytes(made.outputs[f"state:{unit['unit']}"]))
        assert state.formats.unit == unit["unit"]
        assert state.formats.layers.keys() == unit["layers"].keys()
        assert len(state.timesteps) == 3
        assert {name.removesuffix(".qweight") for name in state.tensors if name.endswith(".qweight")} == set(
            unit["layers"]
        )
    layers = made.metrics["layers"]
    assert set(layers) == {name for unit in digits_units[4:7] for name in unit["layers"]}
    assert all(10 < each["sqnr_db"] < 40 for each in layers.values())


def test_the_same_again_and_alone_gives_the_same_digests(
    round_units: Callable[..., TaskOutput], digits_units: list[dict[str, Any]]
) -> None:
    closed = {"method": "closed_form", "positions": 4, "samples": 3, "damping": 0.03}
    together, again = (round_units(slice(4, 7), **closed).outputs for _ in range(2))
    assert together == again
    name = f"state:{digits_units[5]['unit']}"
    assert round_units(slice(5, 6), **closed).outputs == {name: together[name]}
    assert round_units(slice(5, 6)).outputs[name] != together[name]
    assert round_units(slice(5, 6), **closed | {"seed": 1}).outputs[name] != together[name]


def test_the_passs_parameters_reach_it(round_units: Callable[..., TaskOutput]) -> None:
    closed = {"method": "closed_form", "positions": 4, "samples": 3, "damping": 0.03}
    (usual,) = round_units(slice(4, 5), **closed).outputs.values()
    for name, value in {"positions": 9, "samples": 1, "damping": 0.5}.items():
        (other,) = round_units(slice(4, 5), **closed | {name: value}).outputs.values()
        assert other != usual, name
