from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quant_core
from quant_core.artifact.folder import write_artifact
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, merge_formats
from quant_core.methods.mpqdm.distillation import Distillation, Distilled, feature_unit
from quant_core.methods.mpqdm.relation import relation_loss
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, UnitFormat
from quant_spec.quantization_config import quantization_config
from quant_spec.tasks.distill import Params
from tests.quant_core.params import distillation, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]
RATES = {"lr": 0.02, "weight_lr": 3e-4, "activation_lr": 1e-3, "zero_point_lr": 1e-3, "bias_lr": 1e-4}
# 100 of the sum over the 64 positions of an 8 x 8 image
CONFIG = distillation(iterations=8, batch_size=4, rank=3, relation_weight=6_400.0, positions=1024, **RATES)


@pytest.fixture(scope="module")
def states(calibrated: Calibrated, unit_formats: ChooseFormats) -> list[UnitState]:
    denoiser, calibration = calibrated("unet")
    units = unit_formats(denoiser, bits=3, activation=ActivationSpec(4), activation_range="mse")
    return [each.state for each in round_units(denoiser.model, calibration, units, rounding())]


@pytest.fixture
def start(calibrated: Calibrated, states: list[UnitState], trajectories: CalibrationSet) -> Callable[..., Distillation]:
    def make(config: Params = CONFIG, gains: tuple[float, ...] | None = None) -> Distillation:
        teacher, model = calibrated("unet")[0].model, calibrated("unet")[0].model
        return Distillation(teacher, model, states, trajectories, config, gains)

    return make


def run(made: Distillation, until: int | None = None) -> Distilled:
    while made.iteration < (made.config.iterations if until is None else until):
        made.step()
    return made.finish()


@pytest.mark.parametrize(("iterations", "share"), [(20, 0.95), pytest.param(120, 0.8, marks=pytest.mark.slow)])
def test_the_prediction_gets_better_and_what_is_returned_is_what_is_deployed(
    start: Callable[..., Distillation],
    calibrated: Calibrated,
    trajectories: CalibrationSet,
    tmp_path: Path,
    iterations: int,
    share: float,
) -> None:
    made = start(CONFIG.replaced(iterations=iterations))
    result = run(made)
    assert result.is_taken
    assert result.loss_after < share * result.loss_before
    config = json.loads(calibrated("unet")[0].model.to_json_string())
    write_artifact(made.model, config, quantization_config(merge_formats(result.states)), None, tmp_path / "packed")
    loaded = quant_core.load_quantized(tmp_path / "packed", device="cpu", backend="reference")
    total = 0.0
    with torch.no_grad():
        for batch in trajectories.by_step(4):
            index = batch.step * trajectories.samples + torch.arange(len(batch))
            total += float((replay(loaded, batch) - trajectories.predictions(index)).double().square().sum())
    assert total / len(trajectories) == pytest.approx(result.loss_after, rel=1e-6)


def test_a_batch_is_runs_of_consecutive_steps_of_one_trajectory(
    start: Callable[..., Distillation], trajectories: CalibrationSet
) -> None:
    made = start(CONFIG.replaced(batch_size=6))
    seen = set()
    for draw in range(20):
        batch, target, counts = made._draw(torch.Generator().manual_seed(draw))
        assert len(batch) == 6
        assert bool((counts == 1).all())
        for first in range(0, 6, 2):
            steps, rows = batch.step[first : first + 2].tolist(), []
            for place, step in enumerate(steps):
                all_rows = trajectories.rows(step, 0, trajectories.samples).x
                (row,) = [r for r in range(len(all_rows)) if torch.equal(all_rows[r], batch.x[first + place])]
                rows.append(row)
                assert torch.equal(
                    target[first + place],
                    trajectories.predictions(torch.tensor([step * trajectories.samples + row]))[0],
                )
            assert steps[1] == steps[0] + 1
            assert rows[0] == rows[1]
            seen.add((steps[0], rows[0]))
    assert len(seen) == 2 * trajectories.samples, "any run of two of the three steps, of any trajectory"


def test_steps_count_as_much_as_their_errors_do_to_the_sample(start: Callable[..., Distillation]) -> None:
    gains = (9.0, 1.0, 1.0)
    made = start(CONFIG.replaced(batch_size=6, effect=0.5), gains)
    assert made.step_weights.tolist() == pytest.approx([1.8, 0.6, 0.6])  # roots, 1 on average
    total = torch.zeros(3, dtype=torch.float64)
    for draw in range(400):
        batch, _, counts = made._draw(torch.Generator().manual_seed(draw))
        total.index_add_(0, batch.step, counts.flatten().double())
    # The middle step is drawn twice as often as the ends, and counts so much less.
    assert (3 * total / total.sum()).tolist() == pytest.approx([1.8, 0.6, 0.6], rel=0.1)
    plain = run(start(CONFIG.replaced(iterations=40)))
    early = run(start(CONFIG.replaced(iterations=40, effect=1.0), (50.0, 1e-3, 1e-3)))
    assert early.is_taken
    assert (early.loss_before, early.loss_after) != (plain.loss_before, plain.loss_after)
    with pytest.raises(QuantizationError, match="got gains of 2 steps, wanted 3"):
        start(CONFIG.replaced(effect=0.5), (1.0, 1.0))


def test_rates_fall_linearly_and_positions_are_drawn(start: Callable[..., Distillation]) -> None:
    made = start(CONFIG.replaced(positions=5))
    feature = torch.zeros(4, 8, 3, 4)
    drawn = [made._positions(feature, torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert all(each is not None and len(set(each.tolist())) == 5 for each in drawn)
    assert len({tuple(each.tolist()) for each in drawn if each is not None}) == 3
    assert made._positions(torch.zeros(4, 8, 1, 5), torch.Generator()) is None
    first = None
    for iteration in range(4):
        made.step()
        rates = [group["lr"] for group in made.optimizer.param_groups]
        first = first or rates
        assert rates == pytest.approx([rate * (1 - iteration / CONFIG.iterations) for rate in first])


def test_a_loss_that_is_not_finite_is_refused(start: Callable[..., Distillation]) -> None:
    made = start(CONFIG.replaced(weight_lr=1e4))
    with pytest.raises(QuantizationError, match=r"distill: got a loss of \S+ at iteration \d, wanted a finite one"):
        run(made)


def test_what_makes_nothing_better_is_not_taken(start: Callable[..., Distillation], states: list[UnitState]) -> None:
    result = run(
        start(
            CONFIG.replaced(
                iterations=2, lr=1e-12, weight_lr=1e-12, activation_lr=1e-12, zero_point_lr=1e-12, bias_lr=1e-12
            )
        )
    )
    assert not result.is_taken
    assert result.states == states
    assert result.loss_after == result.loss_before


def test_what_is_trained_is_what_is_stored(start: Callable[..., Distillation], trajectories: CalibrationSet) -> None:
    made = start()
    for _ in range(2):
        made.step()
    batch = trajectories.gather(torch.arange(4))
    with made._soft():
        soft = replay(made.model, batch).detach()
    made.finish()
    with torch.no_grad():
        assert torch.equal(replay(made.model, batch), soft)


def test_every_kind_of_variable_learns_and_each_step_has_its_own(start: Callable[..., Distillation]) -> None:
    made = start()
    before = {name: parameter.detach().clone() for name, (parameter, _) in made.learned.items()}
    while made.iteration < 3:
        made.step()
    moved = {
        name.rpartition(".")[2]
        for name, (parameter, _) in made.learned.items()
        if not torch.equal(before[name], parameter)
    }
    assert moved == {"a", "b", "log_scale", "zero_point", "bias"}
    table = next(iter(made.tables.values()))
    assert table.log_scale.shape == (3,)
    assert len(set(table.log_scale.tolist())) == 3


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(start: Callable[..., Distillation]) -> None:
    config = CONFIG.replaced(iterations=4)
    whole = run(start(config))
    stopped = start(config)
    for _ in range(2):
        stopped.step()
    data = stopped.checkpoint()
    stopped.step()  # lost with the process
    resumed = start(config)
    resumed.restore(data)
    assert resumed.iteration == 2
    again = run(resumed)
    assert [s.to_bytes() for s in again.states] == [s.to_bytes() for s in whole.states]
    assert again.loss_after == whole.loss_after
    other = run(start(config.replaced(seed=3)))
    assert [s.to_bytes() for s in other.states] != [s.to_bytes() for s in whole.states]


def test_the_relation_reaches_the_weights_before_its_feature(start: Callable[..., Distillation]) -> None:
    plain, related = start(CONFIG.replaced(relations=False)), start()
    plain.step()
    related.step()
    grads = []
    for made in (plain, related):
        tuned = made.tuned["down_blocks.0.resnets.0.conv1"]
        assert tuned.b.grad is not None
        grads.append(tuned.b.grad)
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3)
    # conv_out comes after the feature
    last = [made.tuned["conv_out"].b.grad for made in (plain, related)]
    assert torch.equal(*last)  # type: ignore[arg-type]


def test_the_relations_gradient_by_finite_differences(
    start: Callable[..., Distillation], trajectories: CalibrationSet
) -> None:
    made = start()
    index = torch.tensor([0, 4, 1, 5])  # steps 0 and 1 of two rows
    batch, bias = trajectories.gather(index), made.tuned["up_blocks.1.resnets.1.conv2"].bias
    assert bias is not None
    found: list[torch.Tensor] = []
    for model in (made.model, made.teacher):
        model.get_submodule(made.feature).register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        replay(made.teacher, batch)
    target = found.pop().double()

    def loss() -> torch.Tensor:
        found.clear()
        with made._soft():
            replay(made.model, batch)
        return relation_loss(found[0].double(), target, 2)

    (grad,) = torch.autograd.grad(loss(), bias)
    # Nothing is quantized between this bias and the feature, so finite differences are exact.
    place = int(grad.abs().argmax())
    moved = []
    for shift in (1e-2, -1e-2):
        with torch.no_grad():
            bias[place] += shift
            moved.append(float(loss()))
            bias[place] -= shift
    assert abs(grad[place]) > 1e-4
    assert float(grad[place]) == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=2e-2)


def test_a_result_that_is_worse_is_not_taken(start: Callable[..., Distillation], states: list[UnitState]) -> None:
    result = run(start(CONFIG.replaced(iterations=3, lr=50.0, bias_lr=10.0)))
    assert result.loss_after == result.loss_before
    assert [s.to_bytes() for s in result.states] == [s.to_bytes() for s in states]


def test_the_feature_is_that_of_the_last_block(states: list[UnitState]) -> None:
    assert feature_unit(states) == "up_blocks.1.resnets.1"


def test_trajectories_without_predictions_are_refused(calibrated: Calibrated, states: list[UnitState]) -> None:
    model, calibration = calibrated("unet")[0].model, calibrated("unet")[1]
    with pytest.raises(QuantizationError, match="got shards without predictions"):
        Distillation(calibrated("unet")[0].model, model, states, calibration, CONFIG)
