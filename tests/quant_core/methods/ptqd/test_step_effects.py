from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser, call_denoiser
from quant_core.diffusion.sampler import Ask, make_scheduler, sample, start, trajectory_conditioning
from quant_core.diffusion.trajectories import LoopTrajectories
from quant_core.methods.ptqd.step_effects import measure_effects, merge_effects, schedule_snr
from quant_core.nn.layers import QUANTIZABLE
from quant_spec.planned import VariedLayer
from quant_spec.ranges import RangeSpec
from quant_spec.sampler import Sampler

# diffusers' own schedulers call numpy on torch tensors in a way that numpy 2 complains of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
SAMPLER = Sampler(scheduler="DDIMScheduler", num_inference_steps=3, eta=1.0)


def varied(denoiser: Denoiser) -> dict[str, VariedLayer]:
    names = [name for name, module in denoiser.model.named_modules() if isinstance(module, QUANTIZABLE)]
    return {name: VariedLayer(False, RangeSpec(), None) for name in names[1:-1]}


def loop(denoiser: Denoiser) -> LoopTrajectories:
    return LoopTrajectories(denoiser.model, denoiser.scheduler_config, SAMPLER, denoiser.conditioning)


@pytest.mark.parametrize("family", ["unet", "digits"])
def test_effects_fall_with_bits_and_add_up_over_shards(family: str, calibrated: Calibrated) -> None:
    denoiser, calibration = calibrated(family)

    def measure(seeds: range) -> Any:
        return measure_effects(loop(denoiser), calibration, varied(denoiser), (4, 8), seeds, batch_size=1)

    found = measure(range(50, 52))
    assert found.gram.shape == (3, 2, 3, 2)
    powers = torch.einsum("skSK->skSK", found.gram)[range(3), :, range(3), :][:, range(2), range(2)]
    assert (powers[:, 0] > 10 * powers[:, 1]).all()
    assert (found.noise[:, 0] > 10 * found.noise[:, 1]).all()
    assert (found.noise[:, 0] < found.signal).all()
    shards = merge_effects([measure(range(50, 51)), measure(range(51, 52))])
    torch.testing.assert_close(shards.gram, found.gram, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(shards.signal, found.signal, rtol=1e-6, atol=1e-9)
    assert found.timesteps == (666.0, 333.0, 0.0)


def test_an_effect_is_that_of_quantizing_one_step_alone(calibrated: Calibrated) -> None:
    denoiser, calibration = calibrated("digits")
    model, name = denoiser.model, "conv_out"
    ranges = {}
    for step in range(3):
        seen: list[Tensor] = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        batch = calibration.rows(step, 0, calibration.samples)
        with torch.no_grad():
            call_denoiser(model, batch.x, batch.timestep, batch.conditioning)
        hook.remove()
        ranges[step] = min(0.0, float(seen[0].min())), max(0.0, float(seen[0].max()))

    def quantized_at(only: int) -> Callable[..., Tensor]:
        def instead(index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
            low, high = ranges[index]
            scale = (high - low) / 15
            zero = round(-low / scale)

            def coarse(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                return (((args[0] / scale).round() + zero).clamp(0, 15).sub(zero) * scale,)

            hook = model.get_submodule(name).register_forward_pre_hook(coarse) if index == only else None
            try:
                return ask()
            finally:
                if hook is not None:
                    hook.remove()

        return instead

    layers = {name: VariedLayer(False, RangeSpec(), None)}
    found = measure_effects(loop(denoiser), calibration, layers, (4, 8), range(60, 62), batch_size=2)
    conditioning = trajectory_conditioning(model, SAMPLER, range(60, 62), None)
    scheduler = make_scheduler(SAMPLER, denoiser.scheduler_config)

    def draw(**options: Any) -> Tensor:
        return sample(model, scheduler, SAMPLER, range(60, 62), conditioning, batch_size=2, **options)

    exact = draw()
    errors = [(draw(instead=quantized_at(step)) - exact).double().flatten() for step in range(3)]
    expected = torch.stack([torch.stack([a @ b for b in errors]) for a in errors])
    torch.testing.assert_close(found.gram[:, 0, :, 0], expected, rtol=1e-3, atol=1e-6)


def test_snr_of_the_schedule() -> None:
    spec = Sampler(scheduler="DDIMScheduler", num_inference_steps=4)
    scheduler = make_scheduler(spec, {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000})
    snr = schedule_snr(scheduler, start(scheduler, spec, (1, 2, 2)))
    abar = scheduler.alphas_cumprod[[750, 500, 250, 0]].double()
    torch.testing.assert_close(snr, abar / (1 - abar))
    flow = Sampler(scheduler="FlowMatchEulerDiscreteScheduler", num_inference_steps=4)
    scheduler = make_scheduler(flow, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    snr = schedule_snr(scheduler, start(scheduler, flow, (1, 2, 2)))
    assert (snr.diff() > 0).all()
    torch.testing.assert_close(snr, ((1 - scheduler.sigmas[:4].double()) / scheduler.sigmas[:4].double()).square())
