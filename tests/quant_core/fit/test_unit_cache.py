from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.unit_cache import Recording, SampleStore, Side, record_unit
from quant_core.inspect.inspection import trace_model
from quant_core.inspect.units import find_units

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]

# (family, unit): which of its inputs vary with the sample
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "up_blocks.1.resnets.0"): {"args": [True, True]},
    ("text_unet", "down_blocks.0.attentions.0.transformer_blocks.0"): {"encoder_hidden_states": True},
    ("dit", "transformer_blocks.1"): {"args": [True], "timestep": True, "class_labels": True},
    ("sd3", "transformer_blocks.0"): {"hidden_states": True, "encoder_hidden_states": True, "temb": True},
    ("flux", "transformer_blocks.0"): {
        "hidden_states": True,
        "encoder_hidden_states": True,
        "temb": True,
        "image_rotary_emb": [False, False],
    },
    ("flux", "single_transformer_blocks.1"): {"hidden_states": True, "image_rotary_emb": [False, False]},
}


def record(
    model: nn.Module, unit: str, calibration: CalibrationSet, scratch: Path, budget: int = 1 << 30, batch: int = 3
) -> Recording:
    return record_unit(model, unit, calibration, batch_size=batch, budget=budget, scratch=scratch, label="test")


def varies(side: Side) -> list[bool]:
    return [isinstance(leaf, SampleStore) for leaf in side.leaves]


def named(recording: Recording) -> dict[str, object]:
    """Which inputs vary, as a tree by argument name."""
    marks = pytree.tree_unflatten(varies(recording.inputs), recording.inputs.spec)
    args, kwargs = marks
    return {**({"args": list(args)} if args else {}), **kwargs}


@pytest.mark.parametrize(("family", "unit"), list(CASES))
def test_what_varies_with_the_sample_is_told_from_what_does_not(
    family: str, unit: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    denoiser, calibration = calibrated(family)
    assert unit in {each.name for each in find_units(denoiser.model, trace_model(denoiser)).units}
    found = named(record(denoiser.model, unit, calibration, tmp_path))
    for name, wanted in CASES[family, unit].items():
        got = found[name]
        assert (list(got) if isinstance(got, tuple | list) else got) == wanted, (name, found)


@pytest.mark.parametrize(("family", "unit"), list(CASES))
def test_a_unit_gives_its_recorded_outputs_for_its_recorded_inputs(
    family: str, unit: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    denoiser, calibration = calibrated(family)
    recording = record(denoiser.model, unit, calibration, tmp_path)
    # rows of several steps, out of order
    index = torch.tensor([len(calibration) - 1, 0, calibration.samples + 1, 2])
    args, kwargs = recording.inputs.batch(index, "cpu")
    with torch.no_grad():
        got = denoiser.model.get_submodule(unit)(*args, **kwargs)
    wanted = recording.outputs.batch(index, "cpu")
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_are_those_of_the_calibration_set(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, calibration = calibrated("digits")
    recording = record(denoiser.model, "conv_in", calibration, tmp_path)
    (x,), _ = recording.inputs.batch(torch.arange(len(calibration)), "cpu")
    assert torch.equal(x, torch.cat([batch.x for batch in calibration.by_step(4)]))
    seen: list[Tensor] = []
    denoiser.model.get_submodule("conv_in").register_forward_hook(lambda *a: seen.append(a[-1]))
    with torch.no_grad():
        replay(denoiser.model, calibration.rows(1, 1, 3))
    torch.testing.assert_close(recording.outputs.batch(torch.tensor([5, 6]), "cpu"), seen[0])


def test_what_exceeds_the_budget_lies_in_files_as_bfloat16(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, calibration = calibrated("dit")
    unit = "transformer_blocks.1"
    kept = record(denoiser.model, unit, calibration, tmp_path)
    assert not list(tmp_path.iterdir())
    spilled = record(denoiser.model, unit, calibration, tmp_path, budget=100)
    files = list(tmp_path.iterdir())
    assert len(files) == 2  # hidden states in and out
    assert sum(file.stat().st_size for file in files) == 2 * len(calibration) * 16 * 8 * 2
    index = torch.arange(len(calibration))
    for side in ("inputs", "outputs"):
        exact, rounded = (
            pytree.tree_leaves(getattr(recording, side).batch(index, "cpu")) for recording in (kept, spilled)
        )
        for a, b in zip(exact, rounded, strict=True):
            if not isinstance(a, Tensor):
                continue
            assert b.dtype == a.dtype
            assert torch.equal(b, a.to(torch.bfloat16).to(a.dtype) if a.is_floating_point() else a)


def test_recording_leaves_no_hook(calibrated: Calibrated, tmp_path: Path) -> None:
    denoiser, calibration = calibrated("digits")
    record(denoiser.model, "conv_in", calibration, tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.model.modules())
