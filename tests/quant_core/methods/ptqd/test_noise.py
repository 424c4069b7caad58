from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record, record_trajectories, replay
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.noise_correction import NoiseCorrection
from quant_core.diffusion.pipeline import load_pipeline
from quant_core.diffusion.sampler import guide, make_scheduler, start
from quant_core.diffusion.trajectories import PipelineTrajectories
from quant_core.methods.ptqd.correction import pair_sums
from quant_core.methods.ptqd.noise import corrected_power, measure_noise, measure_pipeline_noise
from quant_spec.errors import QuantizationError
from quant_spec.prompts import PromptLine
from quant_spec.sampler import Sampler
from tests.tiny_pipelines import save_dit

Make = Callable[[str], nn.Module]
TRAINED = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
GUIDED = Sampler(scheduler="DDIMScheduler", num_inference_steps=3, eta=1.0, guidance_scale=2.0, null_class=0)


def recorded(model: nn.Module, sampler: Sampler, path: Path, seeds: range) -> Path:
    spec = RecordSpec(sampler, batch_size=2, predictions=True, samples=True)
    record_trajectories(Denoiser(model, {}, TRAINED, None), seeds, spec, path)
    return path


def disturbed(model: nn.Module) -> nn.Module:
    """Return the model with an output that is a little off."""
    layer = model.get_submodule("conv_out")
    with torch.no_grad():
        layer.weight.mul_(1.05)
        layer.bias.add_(torch.tensor([0.1, 0.0, -0.1]))
    return model


@pytest.mark.parametrize("guided", [False, True])
def test_noise_is_measured_after_guidance(guided: bool, tiny_model: Make, tmp_path: Path) -> None:
    sampler = GUIDED if guided else GUIDED.replaced(guidance_scale=1.0)
    shard = recorded(tiny_model("unet"), sampler, tmp_path / "shard", range(4))
    model = disturbed(tiny_model("unet"))
    found = measure_noise(model, TRAINED, sampler, shard, batch_size=2)
    calibration, tensors = CalibrationSet([shard]), load_file(shard)
    for step in range(3):
        rows = calibration.rows(step, 0, calibration.samples)
        with torch.no_grad():
            difference = guide(replay(model, rows), sampler) - guide(tensors["prediction"][step], sampler)
        assert len(difference) == 4
        by_hand = difference.double().sum((0, 2, 3))
        torch.testing.assert_close(found.sums[1, step], by_hand, rtol=1e-4, atol=1e-4)
    assert found.count == 4 * 64
    assert found.timesteps == (666.0, 333.0, 0.0)


def test_an_ideal_correction_leaves_no_error(tiny_model: Make, tmp_path: Path) -> None:
    shard = recorded(tiny_model("unet"), GUIDED, tmp_path / "shard", range(2))
    exact, model = tiny_model("unet"), disturbed(tiny_model("unet"))
    bias = (model.conv_out.bias - 1.05 * exact.conv_out.bias).double().expand(3, 3)

    def power(k: float, bias: Tensor) -> Tensor:
        wrapped = make_scheduler(GUIDED, TRAINED)
        tables: dict[str, Any] = {"k": torch.full((3,), k).double(), "bias": bias, "variance": torch.zeros(3).double()}
        scheduler = QuantmillCorrectedScheduler(wrapped, NoiseCorrection((666.0, 333.0, 0.0), **tables))
        start(scheduler, GUIDED, (3, 8, 8))
        return corrected_power(model, scheduler, GUIDED, shard, 1)

    ideal, none = power(0.05, bias), power(0.0, torch.zeros(3, 3).double())
    assert torch.equal(ideal[0], none[0])
    assert (ideal[1] < 1e-6 * none[1]).all()


def test_another_trajectory_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    sampler = GUIDED.replaced(guidance_scale=1.0)
    shard = recorded(tiny_model("unet"), sampler, tmp_path / "shard", range(1))
    with pytest.raises(
        QuantizationError, match=r"got 3 steps, wanted the trajectory of the model's scheduler, 4 steps"
    ):
        measure_noise(tiny_model("unet"), TRAINED, sampler.replaced(num_inference_steps=4), shard, batch_size=1)


def test_noise_of_a_pipeline_is_what_reaches_its_scheduler(tmp_path: Path) -> None:
    denoiser = load_denoiser(save_dit(tmp_path / "model"))
    sampler = Sampler(num_inference_steps=3, guidance_scale=4.0)
    assert denoiser.folder is not None
    pipeline = load_pipeline(denoiser.folder, denoiser.model, make_scheduler(sampler, denoiser.scheduler_config))
    found = PipelineTrajectories(pipeline, sampler, [PromptLine(class_label=1), PromptLine(class_label=2)])
    shard = tmp_path / "shard"
    record(found, range(4), RecordSpec(sampler, batch_size=2, predictions=True), shard)
    other = copy.deepcopy(denoiser.model)
    with torch.no_grad():
        other.get_submodule("proj_out_2").weight.mul_(1.05)
    moments = measure_pipeline_noise(found, other, range(4), batch_size=2)
    calibration, tensors = CalibrationSet([shard]), load_file(shard)
    assert moments.timesteps == tuple(calibration.timesteps.tolist())
    for step in range(3):
        rows = calibration.rows(step, 0, calibration.samples)
        with torch.no_grad():
            exact, noisy = guide(tensors["prediction"][step], sampler), guide(replay(other, rows), sampler)
        # This pipeline steps each sample twice, in both halves of the guided batch.
        expected = 2 * pair_sums(exact, noisy - exact, 1)
        torch.testing.assert_close(moments.sums[:, step], expected, rtol=1e-3, atol=1e-3)
    assert moments.count == 2 * 4 * 64
