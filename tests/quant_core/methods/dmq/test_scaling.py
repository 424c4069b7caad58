"""DMQ: expected errors, learned scales, weights of trajectory steps, the vote."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.channel_stats import ChannelStats
from quant_core.fit.closed_form import damped, factorize, round_closed_form
from quant_core.fit.observe import Watched, observe
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.methods.dmq.channel_scale import early_weights, learn_scale, smooth_scale, step_weights
from quant_core.methods.dmq.channel_shift import Extremes, vote
from quant_core.methods.dmq.expected_error import (
    LayerProblem,
    activation_noise,
    free_variance,
    make_problem,
    output_noise,
    weight_noise,
)
from quant_core.methods.dmq.scaling import fit
from quant_core.nn.layers import weight_groups
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_spec.enums import ActivationMode, Granularity, RoundingMethod, Scaling, Shift, Weighting
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.ranges import RangeSpec
from tests.quant_core.params import ALL, rounding, scaling

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
Units = list[tuple[UnitFormat, UnitRanges]]
ChooseFormats = Callable[..., Units]

UNIT = "down_blocks.1.resnets.0"
SKIP = "up_blocks.1.resnets.0.conv_shortcut"
ROUND = rounding("closed_form", positions=ALL)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of_steps(steps: int = 3, n: int = 4000, channels: int = 12) -> Tensor:
    """Inputs of steps whose channels have ranges from 1 to 16, correlated between channels."""
    mix = torch.eye(channels) + 0.3 * draw(channels, channels, seed=1)
    return (draw(steps, n, channels, seed=2) @ mix) * torch.logspace(0, 4, channels, base=2)


def problem_of(
    x: Tensor, spec: LayerSpec, weight: Tensor, rounding: RoundingMethod = RoundingMethod.CLOSED_FORM
) -> LayerProblem:
    stats = ChannelStats(len(x), x.shape[2])
    for step, rows in enumerate(x):
        stats.update(step, rows[None], torch.Generator())
    flat = x.flatten(0, 1)
    hessian = flat.T @ flat / len(flat)
    free = free_variance(hessian, 0.0) if rounding is RoundingMethod.CLOSED_FORM else hessian.diagonal()
    return make_problem(spec, weight, RangeSpec(), stats, free)


# --- the expected error


@pytest.mark.parametrize("split", [None, (5, 7)])
@pytest.mark.parametrize("mode", [ActivationMode.STATIC, ActivationMode.PER_STEP])
def test_the_activations_error_is_what_rounding_them_leaves(
    split: tuple[int, ...] | None, mode: ActivationMode
) -> None:
    x, weight, channel_scale = rows_of_steps(), draw(6, 12), torch.exp(0.4 * draw(12, seed=3))
    problem = problem_of(x, LayerSpec(WeightSpec(4), ActivationSpec(6, mode=mode), split), weight)
    scaled, parts = x / channel_scale, split or (12,)
    quantized = []
    for part in scaled.split(parts, dim=2):
        dims = (0, 1, 2) if mode is ActivationMode.STATIC else (1, 2)
        grid = qparams_from_range(part.amin(dims, keepdim=True), part.amax(dims, keepdim=True), 6, symmetric=False)
        quantized.append(fake_quantize_affine(part, grid.scale, grid.zero_point, 0, 63))
    measured = ((torch.cat(quantized, 2) - scaled) @ (weight * channel_scale).T).square().sum(2).mean(1)
    torch.testing.assert_close(activation_noise(problem, channel_scale), measured, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("rounding", "granularity"),
    [
        (RoundingMethod.CLOSED_FORM, {}),  # in small groups it clips, which the expectation leaves out
        (RoundingMethod.NEAREST, {}),
        (RoundingMethod.NEAREST, {"granularity": "per_group", "group_size": 5}),
    ],
)
def test_the_weights_error_is_what_rounding_them_leaves(
    rounding: RoundingMethod, granularity: dict[str, int | Granularity]
) -> None:
    x, weight, channel_scale = rows_of_steps(), draw(400, 12), torch.exp(0.4 * draw(12, seed=3))
    spec = LayerSpec(WeightSpec(6, **granularity), ActivationSpec(8))  # type: ignore[arg-type]
    problem = problem_of(x, spec, weight, rounding)
    scaled, groups = weight * channel_scale, weight_groups((400, 12), spec)
    columns = [scaled[:, groups == group] for group in range(int(groups.max()) + 1)]
    low, high = (torch.stack([f(c, dim=1) for c in columns], 1) for f in (torch.amin, torch.amax))
    grid = qparams_from_range(low, high, 6, symmetric=False)
    flat = (x / channel_scale).flatten(0, 1)
    hessian = flat.T @ flat / len(flat)
    if rounding is RoundingMethod.CLOSED_FORM:
        codes = round_closed_form(scaled, factorize(hessian, 0.0), grid, 6, groups).float()
    else:
        codes = (torch.round(scaled / grid.scale[:, groups]) + grid.zero_point[:, groups]).clamp(0, 63)
    error = scaled - (codes - grid.zero_point[:, groups]) * grid.scale[:, groups]
    measured = ((x / channel_scale) @ error.T).square().sum(2).mean(1)
    # shares of steps come from channels alone, not from what they have in common; codes at the ends are clipped
    torch.testing.assert_close(weight_noise(problem, channel_scale).sum(), measured.sum(), rtol=0.15, atol=0)
    torch.testing.assert_close(weight_noise(problem, channel_scale), measured, rtol=0.3, atol=0)


def test_free_variance_is_that_given_the_columns_rounded_later() -> None:
    x = rows_of_steps().flatten(0, 1)
    hessian = x.T @ x / len(x)
    free, h = free_variance(hessian, 0.01), damped(hessian, 0.01)
    order = torch.argsort(h.diagonal(), descending=True)
    for place, column in enumerate(order):
        rest = order[place:]
        wanted = 1 / torch.linalg.inv(h[rest][:, rest])[0, 0]
        torch.testing.assert_close(free[column], wanted, rtol=1e-3, atol=0)
    assert (free <= h.diagonal() * 1.001).all()


# --- learned scales


def test_learned_scales_balance_channels_that_are_unlike() -> None:
    x, weight = rows_of_steps(), draw(8, 12)
    spec = LayerSpec(WeightSpec(8), ActivationSpec(4))
    problem = problem_of(x, spec, weight)
    channel_scale, gain = learn_scale(problem, scaling(weighting=Weighting.UNIFORM))
    before, after = output_noise(problem, torch.ones(12)).sum(), output_noise(problem, channel_scale).sum()
    assert gain == pytest.approx(float(10 * torch.log10(before / after)), abs=1e-3)
    assert gain > 3
    assert float(channel_scale.log().mean()) == pytest.approx(0, abs=1e-5)
    assert float(channel_scale.min()) > 0
    # what is not rounded does not matter: with few weight bits the same layer is scaled less
    timid, _ = learn_scale(
        problem_of(x, replace(spec, weight=WeightSpec(2)), weight), scaling(weighting=Weighting.UNIFORM)
    )
    assert float(timid.log().std()) < float(channel_scale.log().std())


def test_a_result_that_is_not_better_is_not_taken() -> None:
    problem = problem_of(rows_of_steps(), LayerSpec(WeightSpec(8), ActivationSpec(4)), draw(8, 12))
    channel_scale, gain = learn_scale(problem, scaling(iterations=1, lr=200.0))
    assert gain == 0
    assert torch.equal(channel_scale, torch.ones(12))


def test_adaptive_weights_favour_steps_of_small_error() -> None:
    weights = step_weights(torch.tensor([1.0, 3.0, 0.0]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.75**2, 0.25**2, 1.0]))
    assert step_weights(torch.tensor([5.0]), 20.0).tolist() == [1.0]
    torch.testing.assert_close(step_weights(torch.ones(20), 20.0), torch.full((20,), 0.95**20))
    # Step 0 is quiet and step 1 loud, in channels of their own: what favours the quiet one leaves it less error.
    x = draw(2, 2000, 12) * torch.tensor([[[0.3]], [[1.0]]])
    x[0, :, :6] *= 4
    x[1, :, 6:] *= 4
    problem = problem_of(x, LayerSpec(WeightSpec(8), ActivationSpec(4)), draw(8, 12))
    errors = {}
    for weighting in Weighting:
        channel_scale, _ = learn_scale(problem, scaling(weighting=weighting, alpha=8.0))
        errors[weighting] = output_noise(problem, channel_scale)
    assert float(errors[Weighting.ADAPTIVE][0]) < 0.98 * float(errors[Weighting.UNIFORM][0])
    assert float(errors[Weighting.ADAPTIVE][1]) > float(errors[Weighting.UNIFORM][1])
    # and so does what favours the first
    assert float(errors[Weighting.EARLY][0]) < 0.98 * float(errors[Weighting.UNIFORM][0])


def test_early_weights_halve_along_the_trajectory() -> None:
    torch.testing.assert_close(early_weights(20, 0.1)[[0, 2, 4]], torch.tensor([1.0, 0.5, 0.25]) + 0.02)
    torch.testing.assert_close(early_weights(40, 0.1)[[0, 4, 8]], torch.tensor([1.0, 0.5, 0.25]) + 0.02)


def test_smooth_scales_are_those_of_smoothquant() -> None:
    stats = ChannelStats(1, 2)
    stats.update(0, torch.tensor([[[-8.0, 1.0], [4.0, 2.0]]]), torch.Generator())
    channel_scale = smooth_scale(stats, torch.tensor([[1.0, -4.0], [2.0, 1.0]]), 0.5)
    torch.testing.assert_close(channel_scale, torch.tensor([2.0, 0.5**0.5]) / (2.0 * 0.5**0.5) ** 0.5)


def held_out_error(calibrated: Calibrated, state: UnitState, names: list[str]) -> dict[str, float]:
    """Relative error of quantized layers' outputs on full-precision inputs, on samples that nothing was fitted to."""
    denoiser, calibration = calibrated("digits", 16)  # the first twelve are those that factors are fitted to
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        denoiser.model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0])
        )
        for name in names
    ]
    for step in range(calibration.steps):
        batch = calibration.rows(step, 12, 16)
        denoiser.model(batch.x, batch.timestep, **batch.conditioning)
    for handle in handles:
        handle.remove()
    floats = {name: denoiser.model.get_submodule(name) for name in names}
    parts = build_quantized(denoiser.model, merge_formats([state]))
    load_states(denoiser.model, [state])
    noise, signal = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for name in names:
        for step, x in enumerate(inputs[name]):
            parts.clock.set_timestep(calibration.timesteps[step])
            exact = floats[name](x)
            noise[name] += float((parts.layers[name](x) - exact).square().sum())
            signal[name] += float(exact.square().sum())
    return {name: noise[name] / signal[name] for name in names}


@torch.no_grad()
def test_learned_scales_lower_the_error_on_held_out_samples(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits", 12)
    units = [u for u in unit_formats(denoiser, activation=ActivationSpec(5)) if u[0].unit == UNIT]
    names = [name for name in units[0][0].layers if "conv" in name]
    with torch.enable_grad():
        factors, reports = fit(denoiser.model, calibration, units, scaling(positions=ALL, weighting=Weighting.UNIFORM))
    made = {}
    for label, scales in (("none", {}), ("learned", factors.scales)):
        state = round_units(calibrated("digits", 12)[0].model, calibration, units, ROUND, scales)[0].state
        made[label] = held_out_error(calibrated, state, names)
    for name in names:
        assert reports[name].gain_db > 0.2
        assert made["learned"][name] < 0.96 * made["none"][name]


@torch.no_grad()
def test_scales_that_did_not_see_all_samples_leave_room_for_new_ones(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits", 12)
    units = [u for u in unit_formats(denoiser, bits=8, activation=ActivationSpec(8)) if u[0].unit == UNIT]
    names = [name for name in units[0][0].layers if "conv" in name]
    errors = {}
    for share in (0.0, 0.5):
        config = scaling(positions=ALL, weighting=Weighting.UNIFORM, held_out=share)
        with torch.enable_grad():
            factors, _ = fit(denoiser.model, calibration, units, config)
        state = round_units(calibrated("digits", 12)[0].model, calibration, units, ROUND, factors.scales)[0].state
        errors[share] = held_out_error(calibrated, state, names)
    assert math.prod(errors[0.5].values()) < 0.5 * math.prod(errors[0.0].values())


def test_channel_stats_tell_early_rows_apart() -> None:
    stats, x = ChannelStats(1, 2), torch.tensor([[[1.0, 2.0]], [[-3.0, 4.0]], [[5.0, -6.0]]])
    stats.update(0, x[:2], torch.Generator(), fit_rows=1)
    stats.update(0, x[2:], torch.Generator(), fit_rows=-1)
    assert stats.fit_high.tolist() == stats.fit_low.tolist() == [[1.0, 2.0]]
    assert (stats.low.tolist(), stats.high.tolist()) == ([[-3.0, -6.0]], [[5.0, 4.0]])


@torch.no_grad()
def test_scales_are_learned_against_the_ranges_that_are_deployed(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits", 4)
    units = [u for u in unit_formats(denoiser, activation=ActivationSpec(6)) if u[0].unit == UNIT]
    name = f"{UNIT}.conv2"
    spec, weight = units[0][0].layers[name], denoiser.model.get_parameter(f"{name}.weight").clone()
    watched = Watched({}, (), [name], None, None, False, channels={name: 0})
    seen = observe(denoiser.model, calibration, [UNIT], watched, batch_size=2, seed=0)
    free = free_variance(seen.moments[name].mean(), 0.03)
    channel_scale = torch.exp(0.5 * draw(weight.shape[1]))
    problem = make_problem(spec, weight, RangeSpec(), seen.channels[name], free)
    state = round_units(denoiser.model, calibration, units, rounding(), {name: channel_scale})[0].state
    deployed = state.tensors[f"{name}.act_quantizers.0.scale"]
    power = (channel_scale.square() * weight.square().sum((0, 2, 3))).sum()
    torch.testing.assert_close(
        activation_noise(problem, channel_scale), deployed.square() / 12 * power, rtol=1e-4, atol=0
    )


@torch.no_grad()
def test_the_same_seed_gives_the_same_bytes(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    def fitted() -> ChannelScaling:
        denoiser, calibration = calibrated("digits", 4)
        units = [u for u in unit_formats(denoiser) if u[0].unit == "up_blocks.1.resnets.0"]
        with torch.enable_grad():
            return fit(denoiser.model, calibration, units, scaling(iterations=5, shift=Shift.SKIP))[0]

    made = fitted()
    assert made.to_bytes() == fitted().to_bytes()
    assert set(made.shifts) == {SKIP}
    assert set(made.scales) > set(made.shifts)
    read = ChannelScaling.from_bytes([made.of([SKIP]).to_bytes(), made.of(["none"]).to_bytes()])
    assert set(read.scales) == set(read.shifts) == {SKIP}
    assert torch.equal(read.shifts[SKIP], made.shifts[SKIP])


# --- power-of-two steps


def test_the_vote_gives_small_channels_finer_steps_where_samples_agree() -> None:
    # A grid of 16 codes, step 1, zero point 8. Channels: ten times finer, on the coarse grid, in disagreement, none.
    grid, unit_grid = torch.arange(-7.0, 8.0), QParams(torch.tensor(1.0), torch.tensor(8.0))
    fine = 0.9 * draw(20, 15, seed=4).clamp(-1, 1)
    torn = torch.cat([grid.expand(14, -1), fine[:6]])  # 14 of 20 want the coarse step
    x = torch.stack([fine, grid.expand(20, -1), torn, torch.zeros(20, 15)], dim=2)
    exponents = vote(x, unit_grid, 15, 0.85)
    assert exponents.dtype is torch.uint8
    assert exponents.tolist() == [0, SHIFT_DEPTH, SHIFT_DEPTH, SHIFT_DEPTH]
    torn = torch.cat([fine[:14], 1.25 * fine[14:]])[..., None]  # 70 % agree on the finest step
    assert vote(torn, unit_grid, 15, 0.85).tolist() == [SHIFT_DEPTH]
    assert vote(torn, unit_grid, 15, 0.7).tolist() == [0]


def test_the_vote_minds_what_the_others_lose() -> None:
    unit_grid, fine = QParams(torch.tensor(1.0), torch.tensor(8.0)), 0.9 * draw(20, 15, seed=4).clamp(-1, 1)
    torn = torch.cat([fine[:14], 5 * fine[14:]])[..., None]  # 70 % agree, at which 30 % are clipped
    assert vote(torn, unit_grid, 15, 0.7).tolist() == [SHIFT_DEPTH]
    # Values that did not vote: of 1000, one that is clipped by 6 does not matter; one that is clipped by 60 does.
    x, low, count = fine[..., None].expand(-1, -1, 2), torch.full((2,), -0.9), torch.tensor(1000.0)
    extremes = Extremes(low, torch.tensor([7.0, 61.0]), count)
    assert vote(x, unit_grid, 15, 0.85, extremes).tolist() == [0, SHIFT_DEPTH]


@torch.no_grad()
def test_shifts_lower_the_error_of_a_layer_and_are_deployed(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    config = scaling(method=Scaling.NONE, shift=Shift.SKIP)
    denoiser, calibration = calibrated("digits", 4)
    units = [u for u in unit_formats(denoiser, bits=8, activation=ActivationSpec(4)) if u[0].unit in SKIP]
    units = [(replace(f, layers={SKIP: f.layers[SKIP]}, attentions={}), r) for f, r in units]
    block = denoiser.model.get_submodule(SKIP)
    factors, reports = fit(denoiser.model, calibration, units, config)
    assert not factors.scales
    shift = factors.shifts[SKIP]
    assert shift.shape == (3, block.in_channels)
    assert reports[SKIP].shifted == pytest.approx(float((shift < SHIFT_DEPTH).float().mean()))
    assert 0 < reports[SKIP].shifted < 1
    errors = []
    for shifts in ({}, factors.shifts):
        state = round_units(calibrated("digits", 4)[0].model, calibration, units, ROUND, {}, shifts)[0].state
        errors.append(held_out_error(calibrated, state, [SKIP])[SKIP])
    assert errors[1] < errors[0]
    key = f"{SKIP}.act_quantizers.1.channel_shift"
    parts = units[0][0].layers[SKIP].split
    assert parts is not None
    assert torch.equal(state.tensors[key], shift[:, parts[0] :])


@torch.no_grad()
def test_variance_shifts_the_layers_whose_channels_are_unlike(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits", 4)
    units = [
        u for u in unit_formats(denoiser, activation=ActivationSpec(6, mode=ActivationMode.STATIC)) if u[0].unit == UNIT
    ]
    config = scaling(method=Scaling.NONE, shift=Shift.VARIANCE)
    found = [fit(denoiser.model, calibration, units, config.replaced(least_spread=least))[0] for least in (1e-9, 1e3)]
    assert set(found[0].shifts) == set(units[0][0].layers)
    assert {len(shift) for shift in found[0].shifts.values()} == {1}  # static: one row
    assert not found[1].shifts


def test_only_the_rows_that_vote_are_kept() -> None:
    stats, draw = ChannelStats(1, 2, positions=3), torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 2, generator=draw)
    for drawn_rows in (2, 0):
        stats.update(0, x, draw, drawn_rows=drawn_rows)
    assert stats.samples(0).shape == (2, 3, 2)
    assert all((row[None] == x[number][:, None]).all(-1).any(0).all() for number, row in enumerate(stats.samples(0)))
    assert torch.equal(stats.high[0], x.flatten(0, 1).amax(0)), "extremes are of all rows"
