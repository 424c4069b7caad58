from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.hessian import input_rows
from quant_core.fit.observe import Observation, StepRanges, Watched, observe, stop_after
from quant_core.nn.ranges import choose_qparams
from quant_spec.enums import ActivationMode, RangeMethod
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]

RESNET = "up_blocks.0.resnets.0"
CONV, LATER = f"{RESNET}.conv1", "conv_out"
TIME = "time_embedding.linear_1"


@pytest.fixture
def digits(calibrated: Calibrated) -> tuple[nn.Module, CalibrationSet]:
    denoiser, calibration = calibrated("digits")
    return denoiser.model, calibration


def watch(
    model: nn.Module, calibration: CalibrationSet, batch_size: int = 3, seed: int = 0, **more: object
) -> Observation:
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8))
    channels = model.get_submodule(CONV).in_channels
    split = LayerSpec(WeightSpec(4), ActivationSpec(8), (channels - 16, 16))
    chosen = {
        "layers": {CONV: split, TIME: spec},
        "attentions": [],
        "moments": [],
        "positions": None,
        "samples": None,
        "keep_values": False,
    } | more
    watched = Watched(**chosen)  # type: ignore[arg-type]
    return observe(model, calibration, [RESNET], watched, batch_size=batch_size, seed=seed)


def inputs(model: nn.Module, calibration: CalibrationSet, name: str) -> list[Tensor]:
    """A layer's input at each step, all samples, by a plain hook."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in calibration.by_step(calibration.samples):
            replay(model, batch)
    handle.remove()
    return seen


def test_extremes_at_each_step_are_those_of_a_hook(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    found = watch(model, calibration)
    assert found.ranges.keys() == {(CONV, 0), (CONV, 1), (TIME, 0)}
    for step, x in enumerate(inputs(model, calibration, CONV)):
        for part, values in enumerate(x.split((x.shape[1] - 16, 16), dim=1)):
            got = found.ranges[CONV, part]
            torch.testing.assert_close(got.low[step], values.min(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.high[step], values.max(), rtol=1e-4, atol=1e-5)
    assert not found.ranges[CONV, 0].values[0]


def test_steps_at_one_timestep_have_what_all_of_them_saw(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    calibration.timesteps = calibration.timesteps.clone()
    calibration.timesteps[1] = calibration.timesteps[0]
    assert calibration.first_alike[:3] == [0, 0, 2]
    found = watch(model, calibration, channels={CONV: 2}, keep_values=True)
    ranges, channels, seen = found.ranges[TIME, 0], found.channels[CONV], inputs(model, calibration, CONV)
    assert torch.equal(ranges.low[0], ranges.low[1])
    assert len(ranges.values[0]) == len(ranges.values[1]) == 2 * len(ranges.values[2])
    both = torch.cat(seen[:2]).movedim(1, -1).flatten(0, -2)
    for step in (0, 1):
        torch.testing.assert_close(channels.low[step], both.amin(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(channels.second_moment()[step], both.square().mean(0), rtol=1e-3, atol=1e-4)
    assert channels.count[0] == channels.count[1] == 2 * channels.count[2]


def test_second_moments_are_those_of_the_inputs(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    found = watch(model, calibration, moments=[CONV, TIME]).moments
    for name in (CONV, TIME):
        x = torch.cat(inputs(model, calibration, name))
        rows = input_rows(model.get_submodule(name), x, None, torch.Generator())
        assert found[name].rows == len(rows)
        torch.testing.assert_close(found[name].mean(), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)


def test_samples_and_positions_bound_what_enters_a_second_moment(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    found = watch(model, calibration, moments=[CONV, TIME], samples=2, positions=5, batch_size=3).moments
    assert found[CONV].rows == 2 * 5 * calibration.steps
    assert found[TIME].rows == 2 * calibration.steps
    x = torch.cat([step[:2] for step in inputs(model, calibration, TIME)])
    torch.testing.assert_close(found[TIME].mean(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    one = watch(model, calibration, moments=[TIME], samples=2, batch_size=1).moments[TIME]
    torch.testing.assert_close(one.mean(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_what_is_watched_beside_a_layer_changes_nothing(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    attention = next(name for name, module in model.named_modules() if hasattr(module, "to_q"))
    many = watch(model, calibration, moments=[CONV, TIME], positions=5, keep_values=True, attentions=[attention])
    few = watch(model, calibration, moments=[CONV], positions=5, layers={})
    assert torch.equal(many.moments[CONV].mean(), few.moments[CONV].mean())
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8))
    alone = watch(model, calibration, layers={TIME: spec}, keep_values=True)
    for one, two in zip(alone.ranges[TIME, 0].values, many.ranges[TIME, 0].values, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = watch(model, calibration, seed=1, moments=[CONV], positions=5, layers={})
    assert not torch.equal(other.moments[CONV].mean(), few.moments[CONV].mean())


def test_attention_operands_are_seen(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    attention = next(name for name, module in model.named_modules() if hasattr(module, "to_q"))
    processor = model.get_submodule(attention).processor
    found = watch(model, calibration, layers={}, attentions=[attention]).ranges
    assert found.keys() == {(attention, operand) for operand in ("query", "key", "value", "probabilities")}
    for step, query in enumerate(inputs_of_query(model, calibration, f"{attention}.to_q")):
        torch.testing.assert_close(found[attention, "query"].low[step], query.min(), rtol=1e-4, atol=1e-5)
    assert 0 <= found[attention, "probabilities"].low.min() < found[attention, "probabilities"].high.max() <= 1.00001
    assert model.get_submodule(attention).processor is processor


def inputs_of_query(model: nn.Module, calibration: CalibrationSet, name: str) -> list[Tensor]:
    layer = model.get_submodule(name)
    with torch.no_grad():
        return [layer(x) for x in inputs(model, calibration, name)]


def test_a_forward_stops_after_the_last_watched_unit(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    calls = dict.fromkeys(("conv_in", CONV, LATER), 0)

    def count(name: str) -> None:
        calls[name] += 1

    for name in calls:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name))
    watch(model, calibration, batch_size=2)
    assert calls == {"conv_in": 6, CONV: 6, LATER: 0}
    with torch.no_grad(), stop_after(model, [LATER, "conv_in"]) as call:
        call(lambda: replay(model, calibration.rows(0, 0, 1)))
    assert calls[LATER] == 1
    with torch.no_grad():
        replay(model, calibration.rows(0, 0, 1))  # nothing is left behind
    assert calls[LATER] == 2


def test_an_error_in_the_forward_passes_and_leaves_no_hook(digits: tuple[nn.Module, CalibrationSet]) -> None:
    model, calibration = digits
    with pytest.raises(ZeroDivisionError), stop_after(model, ["conv_in"]) as call:
        call(lambda: 1 // 0)
    assert not any(module._forward_hooks for module in model.modules())
    watch(model, calibration)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", list(RangeMethod))
def test_step_ranges_become_tables(method: RangeMethod) -> None:
    draw = torch.Generator().manual_seed(0)
    data = [torch.randn(300, generator=draw) ** 3 * (1 + step) for step in range(3)]
    ranges = StepRanges(3, keep_values=method is not RangeMethod.MINMAX)
    for step, values in enumerate(data):
        for part in values.split(100):
            ranges.update(step, part, 1000, draw)
    spec = RangeSpec(method, 0.9)
    per_step = ranges.qparams(ActivationSpec(4), spec)
    static = ranges.qparams(ActivationSpec(4, mode=ActivationMode.STATIC), spec)
    assert (per_step.scale.shape, static.scale.shape) == ((3,), (1,))
    for tables, rows in ((per_step, data), (static, [torch.cat(data)])):
        for at, row in enumerate(rows):
            ends = torch.stack([row.min(), row.max()])  # once more: they may not have been drawn
            whole = row if method is RangeMethod.MINMAX else torch.cat([row, ends])
            wanted = choose_qparams(whole, 4, symmetric=False, spec=spec)
            torch.testing.assert_close(tables.scale[at], wanted.scale, rtol=0.02, atol=0)
    assert (per_step.scale[1:] > per_step.scale[:-1]).all()


def test_few_values_are_kept_of_much() -> None:
    ranges = StepRanges(1, keep_values=True)
    x = torch.arange(10000.0).reshape(10, 1000)
    ranges.update(0, x, 50, torch.Generator().manual_seed(0))
    assert (ranges.low.item(), ranges.high.item()) == (0, 9999)
    assert len(ranges.values[0][0]) == 50
    assert 3000 < float(ranges.values[0][0].mean()) < 7000
