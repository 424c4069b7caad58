from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from quant_core.diffusion.corrected_scheduler import noise_levels
from quant_core.diffusion.noise_correction import NoiseCorrection, derivatives, noise_scale
from quant_core.diffusion.sampler import make_scheduler, start
from quant_core.methods.ptqd.correction import (
    NoiseMoments,
    correlation,
    fit,
    merge,
    pair_sums,
    residual_power,
)
from quant_spec.errors import QuantizationError
from quant_spec.passes.correct import CorrectFit
from quant_spec.sampler import Sampler

# diffusers' own schedulers call numpy on torch tensors in a way that numpy 2 complains of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TRAINED = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
STEPS, CHANNELS = 3, 2


def pairs(seeds: int, k: float, bias: tuple[float, float], noise: float, start_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make eps and D = k eps + bias + noise, both (S, n, C, 4, 4), each seed's own."""
    parts = []
    for seed in range(start_seed, start_seed + seeds):
        generator = torch.Generator().manual_seed(seed)
        eps = torch.randn(STEPS, 1, CHANNELS, 4, 4, generator=generator) + 0.3
        rest = noise * torch.randn(eps.shape, generator=generator)
        parts.append((eps, k * eps + torch.tensor(bias).reshape(2, 1, 1) + rest))
    return torch.cat([eps for eps, _ in parts], 1), torch.cat([difference for _, difference in parts], 1)


def moments(eps: Tensor, difference: Tensor) -> NoiseMoments:
    sums = torch.stack([pair_sums(x, y, 1) for x, y in zip(eps, difference, strict=True)], dim=1)
    return NoiseMoments((900.0, 500.0, 100.0), eps.shape[1] * 16, sums)


def made(seeds: int = 32, k: float = 0.1, noise: float = 0.05, start_seed: int = 0) -> NoiseMoments:
    return moments(*pairs(seeds, k, (0.02, -0.01), noise, start_seed))


# --- statistics


def test_sharded_statistics_equal_unsharded_in_any_order() -> None:
    eps, difference = pairs(12, 0.1, (0.02, -0.01), 0.05)
    whole = moments(eps, difference)
    cuts = [(0, 1), (1, 5), (5, 6), (6, 12)]
    shards = [moments(eps[:, a:b], difference[:, a:b]) for a, b in cuts]
    merged = merge(shards)
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert merged.count == whole.count
    fitted, expected = (fit(found, made(start_seed=500), CorrectFit()).correction for found in (merged, whole))
    for name in ("k", "bias", "variance"):
        torch.testing.assert_close(getattr(fitted, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
    for order in itertools.permutations(shards):
        assert torch.equal(merge(order).sums, merged.sums)


def test_moments_survive_json_bit_for_bit() -> None:
    found = made()
    again = NoiseMoments.from_json(json.loads(json.dumps(found.to_json())))
    assert torch.equal(again.sums, found.sums)
    assert (again.timesteps, again.count) == (found.timesteps, found.count)


def test_shards_of_different_trajectories_are_refused() -> None:
    with pytest.raises(QuantizationError, match="wanted one trajectory"):
        merge([made(), replace(made(), timesteps=(1.0, 2.0, 3.0))])
    with pytest.raises(QuantizationError, match="got no shards"):
        merge([])


def test_correlation_is_the_slope_of_a_regression_with_intercept() -> None:
    eps, difference = pairs(8, -0.2, (0.5, 0.5), 0.1)
    x, y = eps[0].double().flatten(), difference[0].double().flatten()
    k, r2 = correlation(pair_sums(eps[0], difference[0], 1), 8 * 16)
    design = torch.stack([x, torch.ones_like(x)], 1)
    slope = torch.linalg.lstsq(design, y[:, None]).solution[0, 0]
    assert k == pytest.approx(float(slope), rel=1e-9)
    assert r2 == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1] ** 2), rel=1e-9)


def test_residual_power_is_the_error_that_the_correction_leaves() -> None:
    eps, difference = pairs(8, 0.1, (0.02, -0.01), 0.05)
    bias = torch.tensor([0.03, -0.02], dtype=torch.float64)
    corrected = (eps[1] + difference[1] - bias.reshape(2, 1, 1)) / 1.1
    power = residual_power(pair_sums(eps[1], difference[1], 1), 8 * 16, 0.1, bias) / 1.1**2
    assert power == pytest.approx(float((corrected - eps[1]).square().mean()), rel=1e-6)


def test_channels_of_tokens_are_the_last_dimension() -> None:
    eps, difference = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    sums = pair_sums(eps, difference, -1)
    torch.testing.assert_close(sums[3], (eps.double() * difference.double()).sum((0, 1)))


# --- the fit


def test_fit_finds_what_was_planted() -> None:
    found = fit(made(64), made(32, start_seed=1000), CorrectFit())
    torch.testing.assert_close(found.correction.k, torch.full((3,), 0.1).double(), rtol=0, atol=5e-3)
    torch.testing.assert_close(found.correction.bias[0], torch.tensor([0.02, -0.01]).double(), rtol=0, atol=5e-3)
    torch.testing.assert_close(
        found.correction.variance, torch.full((3,), 0.05**2 / 1.1**2).double(), rtol=0.05, atol=0
    )
    for step in found.report:
        assert step.uses_k
        assert step.uses_bias
        assert step.mse_after < 0.5 * step.mse_before


def test_a_step_is_left_alone_where_held_out_seeds_do_not_gain() -> None:
    unlike = moments(*pairs(32, -0.1, (-0.02, 0.01), 0.05, 1000))
    mixed = replace(unlike, sums=torch.stack([made(32, start_seed=1000).sums[:, 0], *unlike.sums.unbind(1)[1:]], 1))
    found = fit(made(), mixed, CorrectFit())
    assert [step.uses_k for step in found.report] == [True, False, False]
    assert found.correction.k[1:].tolist() == [0, 0]
    assert not found.correction.bias[1:].any()
    for step in found.report[1:]:
        assert step.mse_after == step.mse_before
    ungated = fit(made(), mixed, CorrectFit(held_out=False))
    assert all(step.uses_k for step in ungated.report)
    assert ungated.report[1].mse_after > ungated.report[1].mse_before


def test_k_needs_the_share_of_variance_that_is_asked_for() -> None:
    noisy = made(k=0.02, noise=0.05), made(k=0.02, noise=0.05, start_seed=1000)
    assert 0.05 < fit(*noisy, CorrectFit()).report[0].r2 < 0.3
    assert all(step.uses_k for step in fit(*noisy, CorrectFit()).report)
    assert not any(step.uses_k for step in fit(*noisy, CorrectFit(least_r2=0.3)).report)


@pytest.mark.parametrize("part", ["scale", "bias", "variance"])
def test_each_part_can_be_left_out(part: str) -> None:
    correction = fit(made(), made(start_seed=1000), CorrectFit(**{part: False})).correction
    names = {"scale": "k", "bias": "bias", "variance": "variance"}
    assert {key for key, name in names.items() if getattr(correction, name).any()} == set(names) - {part}


def test_a_correction_survives_json() -> None:
    correction = fit(made(), made(start_seed=1000), CorrectFit(), channel_dim=-1).correction
    again = NoiseCorrection.from_json(json.loads(json.dumps(correction.to_json())))
    assert torch.equal(again.bias, correction.bias)
    assert torch.equal(again.k, correction.k)
    assert (again.timesteps, again.channel_dim) == (correction.timesteps, -1)


# --- the sampler's arithmetic, against diffusers' own


def gains_and_sigmas(name: str, kind: str, eta: float, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Differentiate a real scheduler's step by its prediction, and by its noise."""
    found = []
    clip = {} if name.startswith("Euler") else {"clip_sample": False}
    spec = Sampler(scheduler=name, num_inference_steps=5, eta=eta, options={"prediction_type": kind, **clip, **options})
    count = len(start(make_scheduler(spec, TRAINED), spec, (1, 2, 2)))
    for at in range(count):
        ends = []
        for output, zero_noise in ((0.0, True), (1e-3, True), (0.0, False)):
            scheduler = make_scheduler(spec, TRAINED)
            start(scheduler, spec, (1, 2, 2))
            timestep = scheduler.timesteps[at]
            x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
            scheduler.scale_model_input(x, timestep)
            extra = {"eta": eta} if name == "DDIMScheduler" else {}
            with pytest.MonkeyPatch.context() as patch:
                module = type(scheduler).__module__
                draw = torch.zeros_like if zero_noise else torch.ones_like
                patch.setattr(f"{module}.randn_tensor", lambda *_, draw=draw, x=x, **__: draw(x))
                ends.append(scheduler.step(x + output, timestep, x, return_dict=False, **extra)[0].double().mean())
        found.append((float(ends[2] - ends[0]), float(ends[1] - ends[0]) / 1e-3))
    return found


@pytest.mark.parametrize(
    ("name", "kind", "eta", "options"),
    [
        *(("DDIMScheduler", kind, eta, {}) for kind in ("epsilon", "sample", "v_prediction") for eta in (0.5, 1.0)),
        ("DDIMScheduler", "epsilon", 0.5, {"timestep_spacing": "trailing"}),
        *(("DDPMScheduler", kind, 0.0, {}) for kind in ("epsilon", "sample", "v_prediction")),
        ("DDPMScheduler", "epsilon", 0.0, {"variance_type": "fixed_large"}),
        ("DDPMScheduler", "epsilon", 0.0, {"variance_type": "fixed_small_log"}),
        *(("EulerAncestralDiscreteScheduler", kind, 0.0, {}) for kind in ("epsilon", "v_prediction")),
    ],
)
def test_gain_and_noise_are_those_of_the_schedulers(name: str, kind: str, eta: float, options: dict[str, Any]) -> None:
    spec = Sampler(scheduler=name, num_inference_steps=5, eta=eta, options={"prediction_type": kind, **options})
    scheduler = make_scheduler(spec, TRAINED)
    timesteps = start(scheduler, spec, (1, 2, 2)).double().tolist()
    expected = gains_and_sigmas(name, kind, eta, options)
    levels = noise_levels(scheduler, timesteps, eta)
    assert levels is not None
    for (sigma, gain), (wanted_sigma, wanted_gain) in zip(levels, expected, strict=True):
        assert sigma == pytest.approx(wanted_sigma, rel=1e-4, abs=2e-6)
        assert gain == pytest.approx(wanted_gain, rel=2e-3, abs=1e-5)


def test_other_samplers_have_no_noise_to_take_from() -> None:
    for name in ("DPMSolverMultistepScheduler", "PNDMScheduler", "FlowMatchEulerDiscreteScheduler"):
        assert noise_levels(getattr(diffusers, name)(), [1.0], 1.0) is None
    assert noise_levels(diffusers.DDIMScheduler(), [1.0], 0.0) is None


def test_noise_and_error_together_have_the_scheduled_variance() -> None:
    sigma, gain, variance = 0.3, 0.7, 0.04
    left = sigma * noise_scale(sigma, gain, variance)
    assert left**2 + gain**2 * variance == pytest.approx(sigma**2)
    assert noise_scale(0.1, 1.0, 0.04) == 0.0
    assert noise_scale(0.0, 1.0, 0.04) == 1.0


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(QuantizationError, match="prediction_type: got 'flow'"):
        derivatives("flow", 0.5)
