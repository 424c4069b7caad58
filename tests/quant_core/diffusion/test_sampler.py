from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import dummy_conditioning
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.diffusion.sampler import Step, guide, make_scheduler, sample, start, trajectory_conditioning
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
]


def draw(model: nn.Module, spec: Sampler, seeds: list[int], batch_size: int, on_step: Any = None) -> Tensor:
    conditioning = trajectory_conditioning(model, spec, seeds, None)
    own = FLOW if str(spec.scheduler).startswith("Flow") else TRAINED
    return sample(model, make_scheduler(spec, own), spec, seeds, conditioning, batch_size=batch_size, on_step=on_step)


@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS)
def test_sample_does_not_depend_on_the_batch(scheduler: str, options: dict[str, Any], tiny_model: Make) -> None:
    model = tiny_model("unet")
    spec = Sampler(scheduler=scheduler, num_inference_steps=5, eta=1.0, options=options)
    together, alone = draw(model, spec, [3, 1, 2], 3), draw(model, spec, [2], 1)
    assert together.shape == (3, 3, 8, 8)
    assert together.isfinite().all()
    assert torch.equal(together, draw(model, spec, [3, 1, 2], 3))
    torch.testing.assert_close(together[2:], alone, rtol=1e-3, atol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_sample_equals_diffusers_own_loop(tiny_model: Make) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler="DDIMScheduler", num_inference_steps=4, eta=0.5)
    scheduler = make_scheduler(spec, TRAINED)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    label = trajectory_conditioning(model, spec, [11], None)["class_labels"]
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, label).sample, t, x, eta=0.5, generator=generator).prev_sample
    assert torch.equal(draw(model, spec, [11], 1), x)


def test_sample_scales_inputs_and_noise(tiny_model: Make) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler="EulerDiscreteScheduler", num_inference_steps=3)
    scheduler = make_scheduler(spec, TRAINED)
    scheduler.set_timesteps(3)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * scheduler.init_noise_sigma
    first = scheduler.scale_model_input(x, scheduler.timesteps[0])
    steps: list[Step] = []
    draw(model, spec, [5], 1, steps.append)
    assert torch.equal(steps[0].x, first)
    assert steps[0].x.std() < 3 < x.std()


def test_sample_shows_every_denoiser_call_once(tiny_model: Make) -> None:
    model, spec = tiny_model("unet"), Sampler(scheduler="DDIMScheduler", num_inference_steps=4)
    steps: list[Step] = []
    draw(model, spec, [0, 1, 2], 2, steps.append)
    assert [(step.index, step.row, len(step.x)) for step in steps] == [
        (i, r, n) for r, n in ((0, 2), (2, 1)) for i in range(4)
    ]
    for step in steps:
        assert torch.equal(call_denoiser(model, step.x, step.timestep, step.conditioning), step.prediction)


def test_sample_is_deterministic_with_eta_zero_and_random_with_one(tiny_model: Make) -> None:
    model = tiny_model("unet")
    plain, noisy = (
        draw(model, Sampler(scheduler="DDIMScheduler", num_inference_steps=4, eta=eta), [0], 1) for eta in (0.0, 1.0)
    )
    assert not torch.equal(plain, noisy)


def test_guidance_mixes_two_predictions(tiny_model: Make) -> None:
    model = tiny_model("dit")
    spec = Sampler(scheduler="DDIMScheduler", num_inference_steps=3, guidance_scale=4.0)
    steps: list[Step] = []
    draw(model, spec, [0, 1], 2, steps.append)
    assert steps[0].x.shape[0] == 4
    assert torch.equal(steps[0].x[0], steps[0].x[1])
    assert steps[0].conditioning["class_labels"][1::2].tolist() == [6, 6]
    conditional, unconditional = steps[0].prediction[0::2], steps[0].prediction[1::2]
    assert torch.equal(guide(steps[0].prediction, spec), unconditional + 4 * (conditional - unconditional))


def test_timestep_scale_reaches_the_denoiser(tiny_model: Make) -> None:
    model = tiny_model("flux")
    conditioning = dummy_conditioning(model)
    conditioning["img_ids"] = conditioning["img_ids"][:16]
    spec = Sampler(
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_inference_steps=3,
        timestep_scale=0.001,
        options={"use_dynamic_shifting": True},
    )
    steps: list[Step] = []
    samples = sample(model, make_scheduler(spec, FLOW), spec, [0], conditioning, batch_size=1, on_step=steps.append)
    assert samples.shape == (1, 16, 4)
    assert [float(step.timestep) <= 1 for step in steps] == [True] * 3


def test_dynamic_shift_follows_the_number_of_tokens() -> None:
    spec = Sampler(
        scheduler="FlowMatchEulerDiscreteScheduler", num_inference_steps=4, options={"use_dynamic_shifting": True}
    )
    few, many = (start(make_scheduler(spec, FLOW), spec, (tokens, 4)) for tokens in (256, 4096))
    assert bool((many[1:] > few[1:]).all())
    forced = Sampler(
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_inference_steps=4,
        mu=0.5,
        options={"use_dynamic_shifting": True},
    )
    assert torch.equal(start(make_scheduler(forced, FLOW), forced, (4096, 4)), few)


def test_make_scheduler_takes_the_models_own_and_overrides() -> None:
    assert type(make_scheduler(Sampler(), TRAINED)).__name__ == "DDPMScheduler"
    changed = make_scheduler(Sampler(scheduler="DDIMScheduler", options={"timestep_spacing": "trailing"}), TRAINED)
    assert changed.config.timestep_spacing == "trailing"
    assert changed.config.beta_schedule == "squaredcos_cap_v2"
    learned = make_scheduler(Sampler(), TRAINED | {"variance_type": "learned_range"})
    assert learned.config.variance_type == "fixed_small"


def test_make_scheduler_refuses_what_diffusers_lacks() -> None:
    with pytest.raises(QuantizationError, match="got 'UNet2DModel', wanted a scheduler class"):
        make_scheduler(Sampler(scheduler="UNet2DModel"), TRAINED)
    with pytest.raises(QuantizationError, match=r"wanted that file, or sampler\.scheduler"):
        make_scheduler(Sampler(), None)
