from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import quant_core
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusion.noise_correction import NoiseCorrection, noise_scale
from quant_core.diffusion.sampler import Ask, Instead, make_scheduler, sample, start, trajectory_conditioning
from quant_core.errors import UnknownTimestepError
from quant_spec.enums import UnknownTimestep
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

# diffusers' own schedulers call numpy on torch tensors in a way that numpy 2 complains of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Make = Callable[[str], nn.Module]
TRAINED = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("PNDMScheduler", {}),
    ("UniPCMultistepScheduler", {}),
]
NOISY = ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"]


def correction(timesteps: Tensor, k: float = 0.0, bias: float = 0.0, variance: float = 0.0) -> NoiseCorrection:
    """Make a correction that grows along the trajectory."""
    growth = torch.linspace(0.5, 1, len(timesteps), dtype=torch.float64)
    shift = torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64)
    return NoiseCorrection(
        tuple(timesteps.double().tolist()), k * growth, bias * growth[:, None] * shift, variance * growth
    )


def uncorrected(spec: Sampler) -> Any:
    """Make a scheduler for a model that fits it."""
    return make_scheduler(spec, FLOW if str(spec.scheduler).startswith("Flow") else TRAINED)


def corrected(spec: Sampler, unknown: UnknownTimestep = UnknownTimestep.ERROR, **parts: float) -> Any:
    wrapped = uncorrected(spec)
    timesteps = start(copy.deepcopy(wrapped), spec, (3, 8, 8))
    return QuantmillCorrectedScheduler(wrapped, correction(timesteps, **parts), unknown)


def draw(model: nn.Module, scheduler: Any, spec: Sampler, instead: Instead | None = None) -> Tensor:
    conditioning = trajectory_conditioning(model, spec, [3, 1], None)
    return sample(model, scheduler, spec, [3, 1], conditioning, batch_size=2, instead=instead)


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_without_a_correction_every_scheduler_samples_as_it_did(
    name: str, options: dict[str, Any], tiny_model: Make
) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler=name, num_inference_steps=5, eta=1.0, options=options)
    assert torch.equal(draw(model, corrected(spec), spec), draw(model, uncorrected(spec), spec))


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
def test_every_prediction_is_corrected_before_it_is_used(name: str, options: dict[str, Any], tiny_model: Make) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler=name, num_inference_steps=5, eta=1.0, options=options)
    scheduler = corrected(spec, k=0.1, bias=0.05)
    tables, known = scheduler.correction, torch.tensor(scheduler.correction.timesteps)
    timesteps = start(uncorrected(spec), spec, (3, 8, 8))

    def by_hand(index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
        at = int((known - timesteps[index]).abs().argmin())
        bias = tables.bias[at].float().reshape(3, 1, 1)
        return (ask() - bias) / (1 + tables.k[at].float())

    expected = draw(model, uncorrected(spec), spec, instead=by_hand)
    found = draw(model, scheduler, spec)
    assert torch.equal(found, expected)
    assert (found - draw(model, uncorrected(spec), spec)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NOISY)
def test_variance_is_taken_out_of_the_noise_and_of_nothing_else(name: str) -> None:
    spec = Sampler(scheduler=name, num_inference_steps=5, eta=1.0)
    plain, absorbing = make_scheduler(spec, TRAINED), corrected(spec, variance=0.02)
    extra = {"eta": 1.0} if name == "DDIMScheduler" else {}

    def step(scheduler: Any, at: int, seed: int) -> Tensor:
        scheduler = copy.deepcopy(scheduler)
        timestep = start(scheduler, spec, (3, 8, 8))[at]
        generator = torch.Generator().manual_seed(7)
        x, output = (torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2))
        x = scheduler.scale_model_input(x, timestep)
        arguments = {**extra, "generator": torch.Generator().manual_seed(seed)}
        return scheduler.step(output, timestep, x, return_dict=False, **arguments)[0]

    for at in range(1, 4):
        noise = step(plain, at, 1) - step(plain, at, 2)
        less = step(absorbing, at, 1) - step(absorbing, at, 2)
        # two draws differ by noise alone, which shrinks; their mean without it is the same
        ratio = float((less * noise).sum() / noise.square().sum())
        assert 0 <= ratio < 0.999
        torch.testing.assert_close(less, ratio * noise, rtol=1e-3, atol=1e-4)
        if ratio > 0.1:
            mean = step(plain, at, 1) - step(absorbing, at, 1)
            assert float((mean * noise).sum().abs()) > 0


def test_ddim_keeps_the_direction_of_the_scheduled_noise() -> None:
    """PTQD's sampler overwrites sigma before the direction term; matching variances needs the scheduled one there."""
    spec = Sampler(scheduler="DDIMScheduler", num_inference_steps=5, eta=1.0, options={"clip_sample": False})
    scheduler = corrected(spec, variance=0.01)
    timestep = start(scheduler, spec, (3, 8, 8))[2]
    plain = make_scheduler(spec, TRAINED)
    start(plain, spec, (3, 8, 8))
    x, output, noise = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    after = int(timestep) - 200
    abar, abar_next = (float(plain.alphas_cumprod[t]) for t in (int(timestep), after))
    sigma = float(plain._get_variance(int(timestep), after)) ** 0.5
    direction = (1 - abar_next - sigma**2) ** 0.5
    gain = direction - (abar_next * (1 - abar) / abar) ** 0.5
    left = (sigma**2 - gain**2 * float(scheduler.correction.variance[2])) ** 0.5
    x0 = (x - (1 - abar) ** 0.5 * output) / abar**0.5
    expected = abar_next**0.5 * x0 + direction * output + left * noise
    found = scheduler.step(output, timestep, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert left < 0.99 * sigma
    generated = scheduler.step(output, timestep, x, eta=1.0, generator=torch.Generator().manual_seed(2)).prev_sample
    torch.testing.assert_close(generated, expected, rtol=1e-5, atol=1e-5)


def test_more_error_than_noise_leaves_no_noise() -> None:
    spec = Sampler(scheduler="DDPMScheduler", num_inference_steps=5)
    scheduler = corrected(spec, variance=1e6)
    timestep = start(scheduler, spec, (3, 8, 8))[2]
    x = torch.ones(1, 3, 8, 8)
    draws = [scheduler.step(x, timestep, x, generator=torch.Generator().manual_seed(i)).prev_sample for i in (1, 2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("name", "eta", "options"),
    [
        ("DDIMScheduler", 0.0, {}),
        ("DPMSolverMultistepScheduler", 0.0, {"algorithm_type": "sde-dpmsolver++"}),
        ("PNDMScheduler", 0.0, {}),
    ],
)
def test_variance_changes_nothing_in_other_samplers(
    name: str, eta: float, options: dict[str, Any], tiny_model: Make
) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler=name, num_inference_steps=4, eta=eta, options=options)
    assert torch.equal(draw(model, corrected(spec, variance=0.1), spec), draw(model, corrected(spec), spec))


def test_a_learned_variance_is_not_corrected() -> None:
    scheduler = corrected(Sampler(scheduler="DDPMScheduler", num_inference_steps=5), k=0.2, bias=0.1)
    scheduler.set_timesteps(5)
    output = torch.randn(2, 6, 8, 8)
    found = scheduler.correct(output, scheduler.timesteps[1], 3)
    assert torch.equal(found[:, 3:], output[:, 3:])
    assert torch.equal(found[:, :3], scheduler.correct(output[:, :3], scheduler.timesteps[1], 3))
    assert not torch.equal(found[:, :3], output[:, :3])


def test_channels_of_tokens_are_the_last_dimension() -> None:
    wrapped = diffusers.FlowMatchEulerDiscreteScheduler()
    wrapped.set_timesteps(4)
    made = correction(wrapped.timesteps, bias=0.5)
    scheduler = QuantmillCorrectedScheduler(wrapped, NoiseCorrection(made.timesteps, made.k, made.bias, made.k, -1))
    found = scheduler.correct(torch.zeros(2, 5, 3), wrapped.timesteps[3], 3)
    torch.testing.assert_close(found[1, 4], -made.bias[3].float())


# --- loading


def test_it_loads_as_diffusers_loads_schedulers(tmp_path: Path, tiny_model: Make) -> None:
    model, spec = (
        tiny_model("unet"),
        Sampler(scheduler="DDIMScheduler", num_inference_steps=5, eta=0.5, options={"timestep_spacing": "trailing"}),
    )
    scheduler = corrected(spec, k=0.1, bias=0.05, variance=0.01)
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = quant_core.QuantmillCorrectedScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(draw(model, loaded, spec), draw(model, scheduler, spec))
    assert loaded.config.timestep_spacing == "trailing"
    assert dict(loaded.config)["correction"] == dict(scheduler.config)["correction"]
    again = make_scheduler(
        Sampler(scheduler=None, num_inference_steps=5),
        json.loads((tmp_path / "scheduler/scheduler_config.json").read_text()),
    )
    assert torch.equal(draw(model, again, spec), draw(model, scheduler, spec))


def test_the_wrapped_class_reads_its_own_settings_from_the_same_file(tmp_path: Path) -> None:
    spec = Sampler(scheduler="DDIMScheduler", num_inference_steps=5, options={"timestep_spacing": "trailing"})
    corrected(spec, k=0.1).save_pretrained(tmp_path / "scheduler")
    plain = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert plain.config.beta_schedule == "squaredcos_cap_v2"
    assert plain.config.timestep_spacing == "trailing"


def test_a_pipeline_saves_it_and_finds_it_again(tmp_path: Path) -> None:
    scheduler = corrected(Sampler(scheduler="DDPMScheduler", num_inference_steps=3), k=0.1, bias=0.05, variance=0.01)
    unet = diffusers.UNet2DModel(
        8, 3, 3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["quant_core.diffusion.corrected_scheduler", "QuantmillCorrectedScheduler"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, QuantmillCorrectedScheduler)

    def images(chosen: Any) -> Any:
        chosen.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return chosen(generator=generator, num_inference_steps=3, output_type="np").images

    assert abs(images(loaded) - images(pipeline)).max() < 1e-5  # memory-mapped weights are aligned differently
    plain = diffusers.DDPMPipeline(
        unet, make_scheduler(Sampler(scheduler="DDPMScheduler", num_inference_steps=3), TRAINED)
    )
    assert abs(images(loaded) - images(plain)).max() > 1e-3


def test_pipelines_that_name_the_older_module_still_load(tmp_path: Path) -> None:
    scheduler = corrected(Sampler(scheduler="DDPMScheduler", num_inference_steps=3), k=0.1)
    unet = diffusers.UNet2DModel(
        8, 3, 3, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(
        path.read_text().replace("quant_core.diffusion.corrected_scheduler", "quant_core.corrected_scheduler")
    )
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path).scheduler, QuantmillCorrectedScheduler)


def test_a_recipe_cannot_ask_for_another_scheduler_than_was_corrected() -> None:
    config = json.loads(corrected(Sampler(scheduler="DDIMScheduler", num_inference_steps=5)).to_json_string())
    assert isinstance(
        make_scheduler(Sampler(scheduler="DDIMScheduler", num_inference_steps=5), config), QuantmillCorrectedScheduler
    )
    with pytest.raises(QuantizationError, match="got PNDMScheduler, wanted DDIMScheduler"):
        make_scheduler(Sampler(scheduler="PNDMScheduler", num_inference_steps=5), config)


@pytest.mark.parametrize("missing", ["correction", "wrapped_class"])
def test_a_config_without_its_parts_is_refused(missing: str) -> None:
    config = json.loads(corrected(Sampler(scheduler="DDIMScheduler", num_inference_steps=5)).to_json_string())
    with pytest.raises(QuantizationError, match="wanted a QuantmillCorrectedScheduler's"):
        QuantmillCorrectedScheduler.from_config({key: value for key, value in config.items() if key != missing})
    with pytest.raises(QuantizationError, match="wanted a scheduler class of diffusers"):
        QuantmillCorrectedScheduler.from_config({**config, "wrapped_class": "os"})


# --- other trajectories


def test_another_trajectory_is_refused() -> None:
    scheduler = corrected(Sampler(scheduler="DDIMScheduler", num_inference_steps=5), k=0.1)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UnknownTimestepError, match=r"got 750 of a trajectory of 4 steps, wanted .*set_timesteps\(5\)"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(5)
    scheduler.step(x, scheduler.timesteps[0], x)


def test_another_trajectory_takes_the_nearest_steps_if_told_so() -> None:
    scheduler = corrected(Sampler(scheduler="DDIMScheduler", num_inference_steps=5), UnknownTimestep.NEAREST, bias=0.1)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="timestep 750 has no correction"):
        found = scheduler.correct(x, scheduler.timesteps[0], 3)
    torch.testing.assert_close(found[0, :, 0, 0], -scheduler.correction.bias[0].float())


def test_noise_scale_follows_eta() -> None:
    spec = Sampler(scheduler="DDIMScheduler", num_inference_steps=5)
    scheduler = corrected(spec, variance=0.001)
    start(scheduler, spec, (3, 8, 8))
    scheduler._prepare(torch.zeros(1))
    half, whole = scheduler._scales(0.5), scheduler._scales(1.0)
    assert scheduler._scales(0.0) is None
    assert all(a <= b for a, b in zip(half, whole, strict=True))
    assert noise_scale(1.0, 0.0, 1.0) == 1.0
