"""From trajectories to a folder that diffusers loads, for every family of denoisers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import quant_core
from quant_core.artifact.folder import WEIGHTS_FILE, write_artifact
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.errors import UnknownTimestepError
from quant_core.fit.reconstruction import reconstruct_unit
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, UnitFormat
from quant_spec.quantization_config import quantization_config
from tests.quant_core.params import reconstruction, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]

#: U-Nets with labels and with text, transformers with each kind of modulation; the others repeat them.
QUICK = ("unet", "text_unet", "dit", "pixart", "sd3")
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in ("unet", "text_unet", "sdxl_unet", "dit", "pixart", "sd3", "flux", "digits")
]
LEARN = reconstruction(iterations=10, batch_size=4, lr=0.1, trust=0.0, rounding_weight=10.0)


def quantize(
    family: str,
    calibrated: Calibrated,
    unit_formats: ChooseFormats,
    scratch: Path,
    bits: int,
    activation: ActivationSpec,
) -> list[UnitState]:
    """Round every unit and reconstruct one that has attention, if any has."""
    denoiser, calibration = calibrated(family, 2)
    units = unit_formats(denoiser, bits=bits, activation=activation)
    config = rounding("closed_form", positions=8)
    states = [each.state for each in round_units(denoiser.model, calibration, units, config)]
    place = max(range(len(states)), key=lambda i: (len(states[i].formats.attentions), len(states[i].formats.layers)))
    fresh = calibrated(family, 2)[0].model
    states[place] = reconstruct_unit(fresh, calibration, states[place], states[:place], LEARN, scratch).state
    return states


def simulate(model: nn.Module, states: list[UnitState]) -> nn.Module:
    build_quantized(model, merge_formats(states))
    load_states(model, states)
    return model


def size_bound(floats: nn.Module, states: list[UnitState], steps: int) -> int:
    """Bytes that a packed file may have: bits of the codes, 5 bytes a scale and zero point, the rest as it was."""
    total = 0
    layers = {name: spec for state in states for name, spec in state.formats.layers.items()}
    quantized = {f"{name}.weight" for name in layers}
    total += sum(t.numel() * t.element_size() for name, t in floats.state_dict().items() if name not in quantized)
    for name, spec in layers.items():
        shape = floats.get_parameter(f"{name}.weight").shape
        total += shape[0] * (math.ceil(math.prod(shape[1:]) * spec.weight.bits / 8) + 5 * len(spec.split or (0,)))
        total += 8 * steps * len(spec.split or (0,))
    return total + sum(4 * 8 * steps * len(state.formats.attentions) for state in states)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loaded_equals_simulated(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    with torch.enable_grad():
        states = quantize(family, calibrated, unit_formats, tmp_path, 4, ActivationSpec(8))
    denoiser, calibration = calibrated(family, 2)
    floats = calibrated(family, 2)[0].model
    simulated = simulate(denoiser.model, states)
    folder = tmp_path / "packed"
    config = json.loads(floats.to_json_string())
    write_artifact(simulated, config, quantization_config(merge_formats(states)), None, folder)

    loaded = quant_core.load_quantized(folder, device="cpu", backend="reference")
    for batch in calibration.by_step(2):
        got, wanted, exact = (replay(model, batch) for model in (loaded, simulated, floats))
        assert torch.equal(got, wanted)
        assert torch.isfinite(got).all()
        # Random models have no redundancy; 4 bits are a tenth or two of their output.
        assert 0 < float((got - exact).norm()) < 0.5 * float(exact.norm())
    mixed = calibration.gather(torch.tensor([0, 3, 4]))
    assert torch.equal(replay(loaded, mixed), replay(simulated, mixed))

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        header = 256 * len(file.keys())
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size <= size_bound(floats, states, calibration.steps) + header
    if family == "digits":
        assert size < 0.25 * sum(t.numel() * t.element_size() for t in floats.state_dict().values())
    with pytest.raises(UnknownTimestepError):
        replay(loaded, type(mixed)(mixed.x, mixed.timestep + 0.37, mixed.step, mixed.conditioning))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("mode", [ActivationMode.STATIC, ActivationMode.DYNAMIC_TOKEN])
@torch.no_grad()
def test_every_width_and_mode_loads_as_simulated(
    bits: int, mode: ActivationMode, calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    denoiser, calibration = calibrated("dit", 2)
    units = unit_formats(
        denoiser, bits=bits, activation=ActivationSpec(6, mode=mode), granularity="per_group", group_size=8
    )
    states = [each.state for each in round_units(denoiser.model, calibration, units, rounding())]
    simulated = simulate(calibrated("dit", 2)[0].model, states)
    folder = tmp_path / "packed"
    config = json.loads(simulated.to_json_string())
    write_artifact(simulated, config, quantization_config(merge_formats(states)), None, folder)
    loaded = quant_core.load_quantized(folder, backend="reference")
    batch = calibration.gather(torch.arange(6))
    assert torch.equal(replay(loaded, batch), replay(simulated, batch))
    # ranges that hold for all steps hold at any timestep
    replay(loaded, type(batch)(batch.x, batch.timestep + 1, batch.step, batch.conditioning))


def test_the_same_inputs_give_the_same_states(
    calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        states = quantize("sd3", calibrated, unit_formats, tmp_path / name, 4, ActivationSpec(8))
        runs.append([state.to_bytes() for state in states])
    assert runs[0] == runs[1]
