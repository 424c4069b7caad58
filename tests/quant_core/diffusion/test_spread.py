"""A denoiser whose parts lie on several devices; here both are the CPU, what is tested is who lies where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_core.diffusion.calibration import RecordSpec, record_trajectories
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.spread import spread
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"


def test_spread_model_samples_as_a_whole_one(tmp_path: Path) -> None:
    spec = RecordSpec(Sampler(num_inference_steps=2), batch_size=2)
    whole, parts = load_denoiser(DIGITS), load_denoiser(DIGITS)
    record_trajectories(whole, [1, 2], spec, tmp_path / "whole")
    spread(parts.model, ["cpu", "cpu"])
    hooked = [name for name, module in parts.model.named_modules() if hasattr(module, "_hf_hook")]
    assert len(hooked) > 1
    record_trajectories(parts, [1, 2], spec, tmp_path / "parts")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()


def test_each_device_gets_about_as_much() -> None:
    model = load_denoiser(DIGITS).model
    spread(model, ["cpu", "meta"])
    sizes = {"cpu": 0, "meta": 0}
    for parameter in model.parameters():
        sizes[parameter.device.type] += parameter.numel()
    assert 0.3 < sizes["cpu"] / sum(sizes.values()) < 0.7


def test_model_of_one_part_cannot_be_spread() -> None:
    with pytest.raises(QuantizationError, match="cannot be spread over 3 devices"):
        spread(torch.nn.Linear(8, 8), ["cpu"] * 3)
