"""What a menu mixes is what rounding at its bits gives, byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from quant_core.fit.unit_state import UnitState
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
ROUNDING = {"method": "closed_form", "positions": 8}
WIDTHS = [2, 3, 4, 6]


@pytest.fixture(scope="module")
def some_units(digits_units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two units, one of them with an attention."""
    attentive = next(place for place, unit in enumerate(digits_units) if unit["attentions"])
    return digits_units[attentive - 1 : attentive + 1]


@pytest.fixture(scope="module")
def menu(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    some_units: list[dict[str, Any]],
    common: dict[str, Any],
) -> TaskOutput:
    """These units at four weight widths, and at activation widths 4 and 6 beside the base's 8."""
    params = {"units": some_units, "weight_bits": WIDTHS, "activation_bits": [4, 6]} | ROUNDING | common
    return run_task("menu", params, {"model": [digits], "calibration": calibration_digits})


@pytest.fixture
def direct(
    run_task: RunTask,
    digits: str,
    calibration_digits: list[str],
    some_units: list[dict[str, Any]],
    common: dict[str, Any],
) -> Callable[..., TaskOutput]:
    """Round the units at chosen bits, as `round` does."""

    def run(weights: dict[str, int], activations: int = 8, allocation: str | None = None) -> TaskOutput:
        units = copy.deepcopy(some_units)
        for unit in units:
            for name, layer in unit["layers"].items():
                layer["weight"] = layer["weight"] | {"bits": weights[name]}
                layer["activation"] = layer["activation"] | {"bits": activations}
                if allocation:
                    layer["allocated"] = True
            for attention in unit["attentions"]:
                of = unit["attentions"][attention]
                unit["attentions"][attention] = of | {
                    "activation": of["activation"] | {"bits": activations},
                    "softmax_bits": activations,
                }
        inputs = {"model": [digits], "calibration": calibration_digits}
        if allocation:
            inputs["allocation"] = [allocation]
        return run_task("round", {"units": units} | ROUNDING | common, inputs)

    return run


def mix(
    run_task: RunTask, menu: TaskOutput, units: list[dict[str, Any]], weights: dict[str, Any], activations: list[int]
) -> TaskOutput:
    """Mix units from all states of the menu."""
    told = [
        {
            "unit": unit["unit"],
            "layers": {name: {"activations": activations} | weights[name] for name in unit["layers"]},
            "attentions": {n: {"activations": activations, "softmax": max(activations)} for n in unit["attentions"]},
        }
        for unit in units
    ]
    inputs = {
        kind: [digest for name, digest in menu.outputs.items() if name.startswith(f"{kind}:")]
        for kind in ("weights", "activations", "errors")
    }
    return run_task("mix", {"units": told}, inputs)


def layer_names(units: list[dict[str, Any]]) -> list[str]:
    return [name for unit in units for name in unit["layers"]]


@pytest.mark.parametrize("activations", [8, 4])
def test_a_mix_is_what_rounding_gives(
    run_task: RunTask,
    menu: TaskOutput,
    direct: Callable[..., TaskOutput],
    some_units: list[dict[str, Any]],
    activations: int,
) -> None:
    bits = {name: WIDTHS[place % len(WIDTHS)] for place, name in enumerate(layer_names(some_units))}
    mixed = mix(run_task, menu, some_units, {n: {"weights": b} for n, b in bits.items()}, [activations])
    assert mixed.outputs == direct(bits, activations).outputs


def test_steps_have_the_tables_of_their_range(
    run_task: RunTask,
    menu: TaskOutput,
    direct: Callable[..., TaskOutput],
    task_store: NodeStore,
    some_units: list[dict[str, Any]],
) -> None:
    bits = dict.fromkeys(layer_names(some_units), 4)
    mixed = mix(run_task, menu, some_units, {n: {"weights": b} for n, b in bits.items()}, [8, 4, 6])
    whole = {width: direct(bits, width).outputs for width in (8, 4, 6)}
    for output, digest in mixed.outputs.items():
        state = UnitState.from_bytes(task_store.get_bytes(digest))
        own = {w: UnitState.from_bytes(task_store.get_bytes(made[output])).tensors for w, made in whole.items()}
        for spec in state.formats.layers.values():
            assert spec.activation is not None
            assert (spec.activation.bits, spec.activation.step_bits) == (8, (8, 4, 6))
        for name, tensor in state.tensors.items():
            if ".act_quantizers." in name:
                assert tensor.tolist() == [own[width][name][step] for step, width in enumerate((8, 4, 6))]


def test_promoted_channels_are_those_that_gain_most_and_rounded_as_mixtures_are(
    run_task: RunTask,
    menu: TaskOutput,
    direct: Callable[..., TaskOutput],
    task_store: NodeStore,
    some_units: list[dict[str, Any]],
) -> None:
    names = layer_names(some_units)
    weights = {name: {"weights": 3, "promoted": 0.25, "promoted_bits": 4} for name in names}
    mixed = mix(run_task, menu, some_units, weights, [8])
    states = [UnitState.from_bytes(task_store.get_bytes(digest)) for digest in mixed.outputs.values()]
    channels = {n: s.tensors[f"{n}.channel_bits"] for s in states for n in s.formats.layers}
    assert {float((bits == 4).float().mean()) for bits in channels.values()} == {0.25}
    assert mixed.outputs == direct(dict.fromkeys(names, 3), 8, task_store.put_bytes(save(channels))).outputs
    low, high = (
        [UnitState.from_bytes(task_store.get_bytes(d)) for n, d in menu.outputs.items() if n.startswith(f"weights:{w}")]
        for w in (3, 4)
    )
    assert low[0].formats.layers.keys() == high[0].formats.layers.keys()
    for bits in channels.values():
        assert bits.dtype is torch.uint8


def test_a_width_that_is_not_there_is_named(
    run_task: RunTask, menu: TaskOutput, some_units: list[dict[str, Any]]
) -> None:
    weights = {name: {"weights": 5} for name in layer_names(some_units)}
    with pytest.raises(Exception, match="got 5 bits, wanted one of 2, 3, 4, 6"):
        mix(run_task, menu, some_units, weights, [8])
