from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quant_core
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.unit_state import UnitState
from quant_spec.formats import SHIFT_DEPTH
from tests.quant_core.agreement import check_release
from workers.execution.context import TaskOutput
from workers.storage.manifest import pull_tree
from workers.storage.store import NodeStore

RunTask = Callable[..., TaskOutput]
DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"
UNIT = "up_blocks.1.resnets.0"
SKIP = f"{UNIT}.conv_shortcut"
LEARNED = {
    "method": "learned",
    "iterations": 8,
    "lr": 0.02,
    "weighting": "uniform",
    "samples": 6,
    "positions": 8,
    "shift": "skip",
    "consensus": 0.85,
    "rounding": "nearest",
}


def test_factors_go_through_rounding_into_the_packed_model(
    run_task: RunTask,
    task_store: NodeStore,
    digits: str,
    calibration_digits: list[str],
    digits_units: list[dict[str, Any]],
    common: dict[str, Any],
    seeds: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    model = {"model": [digits], "calibration": calibration_digits}
    place = [unit["unit"] for unit in digits_units].index(UNIT)
    some = digits_units[place - 1 : place + 2]
    told = {"seed": 0, "forward_batch_size": 4}
    made = run_task("scale", {"units": some} | LEARNED | told, model)
    json.dumps(made.metrics)
    assert made.metrics["layers"][SKIP]["gain_db"] > 0
    assert set(made.outputs) == {f"factors:{unit['unit']}" for unit in some}
    own = ChannelScaling.from_bytes([task_store.get_bytes(made.outputs[f"factors:{UNIT}"])])
    assert set(own.shifts) == {SKIP}
    assert set(own.scales) == {name for name in made.metrics["layers"] if name.startswith(UNIT)}
    # rounding and its damping are known to the loss
    alone = [unit for unit in some if unit["unit"] == UNIT]
    kinds = [{"rounding": "closed_form", "damping": 0.03}, {"rounding": "closed_form", "damping": 0.5}]
    found = [run_task("scale", {"units": alone} | LEARNED | told | kind, model).outputs for kind in ({}, *kinds)]
    assert len({each[f"factors:{UNIT}"] for each in found}) == 3
    # a unit's factors do not depend on those that are scaled beside it
    assert found[0].items() <= made.outputs.items()

    inputs = model | {"factors": list(made.outputs.values())}
    rounded = run_task("round", {"units": some, "method": "nearest"} | common, inputs).outputs
    params = {"sampler": seeds(0, 1)["sampler"]}
    packed = run_task("pack", params, {"model": [digits], "states": list(rounded.values())})
    pull_tree(task_store, packed.outputs["packed"], tmp_path / "packed")
    loaded, floats = quant_core.load_quantized(tmp_path / "packed", backend="reference"), load_denoiser(DIGITS).model
    quantizer = loaded.get_submodule(f"{SKIP}.act_quantizers.0")
    count = len(quantizer.channel_scale)
    assert torch.equal(quantizer.channel_scale, own.scales[SKIP][:count])
    assert torch.equal(quantizer.channel_shift, own.shifts[SKIP][:, :count])
    plain = UnitState.from_bytes(
        task_store.get_bytes(
            run_task("round", {"units": alone, "method": "nearest"} | common, model).outputs[f"state:{UNIT}"]
        )
    )
    assert "channel_scale" not in str(plain.formats.layers[SKIP].to_json())
    # the table holds the finest step
    widest = own.scales[SKIP].max() * quantizer.scale * 2**SHIFT_DEPTH
    assert (widest >= 0.9 * plain.tensors[f"{SKIP}.act_quantizers.0.scale"]).all()
    calibration = CalibrationSet([task_store.local_path(digest) for digest in calibration_digits])
    with torch.no_grad():
        for batch in calibration.by_step(6):
            exact = replay(floats, batch)
            assert 0.001 < float((replay(loaded, batch) - exact).norm() / exact.norm()) < 0.5
    for backend in ("cpu", "auto"):
        runs = check_release(tmp_path / "packed", backend, lambda model: replay(model, batch))
        assert not runs or runs[SKIP] == "cpu"


def test_smooth_scales_need_no_second_moments(
    run_task: RunTask, digits: str, calibration_digits: list[str], digits_units: list[dict[str, Any]]
) -> None:
    params = {"method": "smooth", "exponent": 0.5, "shift": "none", "seed": 0, "forward_batch_size": 4}
    units = [unit for unit in digits_units if unit["unit"] == UNIT]
    made = run_task("scale", {"units": units} | params, {"model": [digits], "calibration": calibration_digits})
    report = made.metrics["layers"][SKIP]
    assert report["gain_db"] == report["shifted"] == 0
    assert report["least"] < 1 < report["greatest"]
