from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quant_core.errors import UnknownTimestepError
from quant_core.nn.model import build_quantized
from quant_core.nn.steps import StepClock, attach_clock
from quant_spec.enums import ActivationMode, UnknownTimestep
from quant_spec.formats import ModelFormat

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]


def test_a_timestep_becomes_the_index_of_its_step() -> None:
    clock = StepClock((900.0, 500.0, 100.5))
    assert clock.steps == 3
    for given, wanted in [
        (500, 1),
        (torch.tensor(900), 0),
        (torch.tensor([100.5]), 2),
        (torch.tensor([500, 900]), [1, 0]),
    ]:
        clock.set_timestep(given)
        assert clock.index.tolist() == wanted


def test_close_timesteps_in_the_unit_interval_are_told_apart() -> None:
    clock = StepClock((1.0, 0.999, 0.998))
    clock.set_timestep(torch.tensor([0.998, 0.999, 1.0]))
    assert clock.index.tolist() == [2, 1, 0]


@pytest.mark.parametrize("given", [499, torch.tensor([500.0, 899.0])])
def test_unknown_timesteps_are_refused(given: torch.Tensor | float) -> None:
    clock = StepClock((900, 500))
    with pytest.raises(UnknownTimestepError, match=r"timestep: got (499|899), wanted one .* \(2 steps, 900 to 500\)"):
        clock.set_timestep(given)


def test_unknown_timesteps_take_the_nearest_step_if_asked_to() -> None:
    clock = StepClock((900, 500), UnknownTimestep.NEAREST)
    with pytest.warns(UserWarning, match="timestep 710 is not in the calibrated trajectory"):
        clock.set_timestep(710)
    assert clock.index.tolist() == 0


_SHIFTED = [3000 * s / (1000 + 2 * s) for s in range(1000, 0, -50)]  # of flow matching, in 20 steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "trajectory",
    [
        lambda dtype: torch.arange(951, 0, -50).to(dtype),
        lambda dtype: torch.tensor(_SHIFTED).to(dtype),
        lambda dtype: torch.tensor(_SHIFTED).to(dtype) / 1000,
        lambda dtype: 1 - torch.tensor(_SHIFTED).to(dtype) / 1000,
        lambda dtype: (torch.tensor(_SHIFTED).to(dtype) / 1000).float(),
    ],
    ids=["integers", "thousand", "one", "growing", "rounded before"],
)
def test_steps_are_found_whatever_rounded_their_timesteps(
    trajectory: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype
) -> None:
    exact = trajectory(torch.float32)
    clock = StepClock(exact.double().tolist())
    for index, timestep in enumerate(trajectory(dtype)):
        clock.set_timestep(timestep, dtype)
        assert clock.step == index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_steps_are_refused_at_the_first_whatever_the_model_computes_in(dtype: torch.dtype) -> None:
    clock = StepClock(torch.arange(951, 0, -50).double().tolist(), num_inference_steps=20)
    with pytest.raises(UnknownTimestepError, match="num_inference_steps=20, and that scheduler's own sigmas"):
        clock.set_timestep(torch.tensor(961), dtype)


def test_a_timestep_that_comes_twice_is_its_first_entry() -> None:
    clock = StepClock((900.0, 900.0, 500.0, 500.0))
    clock.set_timestep(torch.tensor([500, 900]))
    assert clock.index.tolist() == [2, 0]


def test_gather_gives_each_sample_its_entry() -> None:
    clock, table = StepClock((900, 500)), torch.tensor([1.0, 2.0])
    clock.set_timestep(torch.tensor([500, 900, 500]))
    assert clock.gather(table, torch.empty(3, 4, 5)).tolist() == [[[2.0]], [[1.0]], [[2.0]]]
    # heads or frames of one sample are adjacent
    assert clock.gather(table, torch.empty(6, 4)).flatten().tolist() == [2, 2, 1, 1, 2, 2]
    assert clock.gather(torch.tensor([7.0]), torch.empty(3, 4)).tolist() == 7.0
    clock.set_timestep(500)
    assert clock.gather(table, torch.empty(3, 4)).tolist() == 2.0


def test_without_a_trajectory_any_timestep_will_do() -> None:
    clock = StepClock(())
    clock.set_timestep(torch.tensor([3, 4]))
    assert (clock.steps, clock.index.tolist()) == (1, 0)


def test_the_clock_reads_the_forward_argument_by_place_or_name() -> None:
    class Denoiser(nn.Module):
        def forward(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
            return x

    model, clock = Denoiser(), StepClock((900, 500))
    attach_clock(model, clock)
    model(torch.zeros(1), 500)
    assert clock.index == 1
    model(torch.zeros(1), timestep=900)
    assert clock.index == 0
    with pytest.raises(UnknownTimestepError, match=r"ReLU\.forward takes no timestep"):
        attach_clock(nn.ReLU(), clock)
    attach_clock(nn.ReLU(), StepClock(()))


@pytest.mark.parametrize("family", ["unet", "text_unet", "dit", "flux"])
def test_a_batch_of_mixed_timesteps_equals_the_runs_of_each_step(
    family: str, tiny_model: Make, quantize_model: Quantize
) -> None:
    model = tiny_model(family)
    quantize_model(model)
    draw = torch.Generator().manual_seed(3)
    conditioning: dict[str, torch.Tensor] = {}
    shape: tuple[int, ...] = (4, 8, 8)
    if family == "unet":
        shape, conditioning = (3, 8, 8), {"class_labels": torch.arange(4)}
    elif family == "dit":
        conditioning = {"class_labels": torch.arange(4)}
    elif family == "text_unet":
        conditioning = {"encoder_hidden_states": torch.randn(4, 5, 12, generator=draw)}
    else:
        shape = (16, 4)
        conditioning = {
            "encoder_hidden_states": torch.randn(4, 5, 12, generator=draw),
            "pooled_projections": torch.randn(4, 6, generator=draw),
            "guidance": torch.ones(4),
        }
    ids = {"img_ids": torch.randn(16, 3, generator=draw), "txt_ids": torch.zeros(5, 3)} if family == "flux" else {}
    x, timesteps = torch.randn(4, *shape, generator=draw), torch.tensor([500.0, 100.0, 900.0, 500.0])

    def run(rows: torch.Tensor, when: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(
                x[rows], timestep=when, **{k: v[rows] for k, v in conditioning.items()}, **ids, return_dict=False
            )[0]

    everyone = torch.arange(4)
    mixed = run(everyone, timesteps)
    if family in ("unet", "dit"):
        # The scales of a step decide bits; another step's give others.
        assert not torch.equal(mixed[1:2], run(everyone, torch.full((4,), 500.0))[1:2])
    for step in (900.0, 500.0, 100.0):
        # The same rows in a batch of the same size, so that only the tables can make a difference.
        same = timesteps == step
        other = torch.where(same, torch.arange(4), torch.nonzero(same)[0, 0])
        assert torch.equal(mixed[same], run(other, torch.full((4,), step))[same])


def test_a_quantized_model_refuses_other_trajectories(tiny_model: Make, quantize_model: Quantize) -> None:
    model = tiny_model("unet")
    quantize_model(model)
    with pytest.raises(UnknownTimestepError, match="got 499"):
        model(torch.zeros(1, 3, 8, 8), 499, torch.tensor([0]))
    static = tiny_model("unet")
    quantize_model(static, ActivationMode.STATIC)
    static(torch.zeros(1, 3, 8, 8), 499, torch.tensor([0]))


def test_the_plan_says_what_to_do_at_unknown_timesteps(tiny_model: Make) -> None:
    parts = build_quantized(tiny_model("unet"), ModelFormat({}, {}, (9.0,), UnknownTimestep.NEAREST))
    assert parts.clock.unknown is UnknownTimestep.NEAREST


def test_a_batch_at_one_step_is_one_index() -> None:
    clock = StepClock([900.0, 500.0, 100.0])
    clock.set_timestep(torch.tensor([500.0, 500.0]))
    assert (clock.index.shape, int(clock.index), clock.step) == ((), 1, 1)
    clock.set_timestep(torch.tensor([500.0, 100.0]))
    assert (clock.index.tolist(), clock.step) == ([1, 2], None)


def test_a_clock_of_a_device_looks_up_there() -> None:
    clock = StepClock([900.0, 500.0, 100.0])
    clock.run_on(torch.device("cpu"))
    for timestep, index in ((500, 1), (torch.tensor([900, 100]), [0, 2]), (torch.tensor([100.0004]), 2)):
        clock.set_timestep(timestep)
        assert clock.index.tolist() == index
        assert clock.step is None
    clock.set_label(torch.tensor([2, 0]), 3)
    assert clock.rows(3).tolist() == [8, 6]
    with pytest.raises(RuntimeError, match="timestep: wanted one of the calibrated trajectory"):
        clock.set_timestep(torch.tensor([500.0, 499.0]))
    with pytest.raises(RuntimeError, match="class_labels: wanted 0 to 2"):
        clock.set_label(torch.tensor([3]), 3)
    nearest = StepClock([900.0, 500.0], UnknownTimestep.NEAREST)
    nearest.run_on(torch.device("cpu"))
    nearest.set_timestep(torch.tensor(600.0))
    assert int(nearest.index) == 1
