"""NaN and infinity are found at the step where they arise, and blamed on whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories
from quant_core.diffusion.conditioning import draw_conditioning
from quant_core.diffusion.denoiser import Denoiser, channel_dim, has_signals, has_tokens, sample_shape
from quant_core.errors import DenoiserError, NotFiniteError
from quant_core.methods.ptqd.noise import measure_noise
from quant_core.metrics.evaluation import evaluate_shard
from quant_core.metrics.images import signal_maps, to_rgb
from quant_spec.enums import SampleSpace
from quant_spec.sampler import Sampler

Make = Callable[[str], nn.Module]
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
ZERO_SNR = SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
STEPS = Sampler(num_inference_steps=4)


class Gray(nn.Module):
    """Predicts its input, times infinity from a timestep on downwards."""

    def __init__(self, broken_from: int = -1, *, quantized: bool = False) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"in_channels": 3, "sample_size": 4} | (
            {"quantization_config": {}} if quantized else {}
        )
        self.broken_from = broken_from

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        broken = (timestep <= self.broken_from)[:, None, None, None]
        return torch.where(broken, sample * torch.inf, sample * 0.1)


def whole(recorded: int) -> RecordSpec:
    """Return what a reference records."""
    return RecordSpec(STEPS, recorded_seeds=recorded, predictions=True, samples=True)


def test_a_scheduler_that_divides_by_zero(tmp_path: Path) -> None:
    denoiser = Denoiser(Gray(), {}, ZERO_SNR, None)
    message = r"sampler gives NaN .* at step 0 \(timestep 999\): DDIMScheduler made it, Gray did not; .*zero_snr"
    with pytest.raises(NotFiniteError, match=message):
        record_trajectories(denoiser, range(2), RecordSpec(STEPS), tmp_path / "shard")


def test_a_model_that_predicts_infinity(tmp_path: Path) -> None:
    denoiser = Denoiser(Gray(300), {}, SCHEDULER, None)
    with pytest.raises(NotFiniteError, match=r"at step 2 \(timestep 250\): Gray predicted it"):
        record_trajectories(denoiser, range(2), whole(1), tmp_path / "shard")


def test_a_quantized_model_is_named(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    record_trajectories(Denoiser(Gray(), {}, SCHEDULER, None), range(2), whole(2), reference)
    broken = Gray(300, quantized=True)
    with pytest.raises(NotFiniteError, match=r"sampler gives .* \(timestep 250\): the quantized Gray predicted it"):
        evaluate_shard(
            broken,
            SCHEDULER,
            STEPS,
            range(2),
            reference,
            tmp_path / "out",
            batch_size=2,
            space=SampleSpace.PIXELS,
        )
    with pytest.raises(NotFiniteError, match=r"prediction is NaN .* at step 2 .*the quantized Gray"):
        measure_noise(broken, SCHEDULER, STEPS, reference, batch_size=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_prompts_of_any_float_are_in_the_model_s_dtype(tiny_model: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    model, file = tiny_model("text_unet"), tmp_path / "conditioning.safetensors"
    stored = torch.randn(2, 5, 12).to(dtype)
    save_file({"encoder_hidden_states": stored, "null.encoder_hidden_states": stored[:1].clone()}, file)
    assert draw_conditioning(model, [0], file)["encoder_hidden_states"].dtype == torch.float32
    assert draw_conditioning(model.half(), [0], file)["encoder_hidden_states"].dtype == torch.float16
    model.float()
    sampler = Sampler(num_inference_steps=2, guidance_scale=3.0)
    record_trajectories(Denoiser(model, {}, SCHEDULER, file), range(2), RecordSpec(sampler), tmp_path / "shard")
    told = CalibrationSet([tmp_path / "shard"]).conditioning["encoder_hidden_states"]
    rows = [row for row in stored.float() if torch.equal(row, told[0])]
    assert len(rows) == 1, "the numbers of one prompt, rounded no further"


def test_a_size_that_is_not_known_is_asked_for() -> None:
    class Open(nn.Module):
        config: ClassVar[dict[str, Any]] = {"in_channels": 4, "sample_size": None}

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

    with pytest.raises(DenoiserError, match=r"got sample_size null.*--sample-size"):
        sample_shape(Open(nn.Conv2d(4, 8, 3)))
    packed = Open(nn.Linear(4, 8))
    assert (sample_shape(packed, 9), has_tokens(packed), channel_dim(packed)) == ((9, 4), True, -1)


def test_signals_are_known_when_their_convolutions_are_quantized() -> None:
    class Audio(nn.Module):
        config: ClassVar[dict[str, Any]] = {"in_channels": 4, "sample_size": 10}

        def __init__(self) -> None:
            super().__init__()
            layer: Any = nn.Identity()
            layer.kind, layer.in_channels = nn.Conv1d, 4  # as a quantized layer has them
            self.layer = layer

    assert (sample_shape(Audio()), has_signals(Audio()), channel_dim(Audio())) == ((4, 10), True, 1)
    lines = signal_maps(torch.arange(20.0).reshape(1, 2, 10))
    assert lines.shape == (1, 2, 3, 4)
    assert lines[0, 0].flatten().tolist() == [*range(10), 0, 0]
    assert to_rgb(lines, lines, SampleSpace.LATENTS).shape == (1, 3, 3, 4)
