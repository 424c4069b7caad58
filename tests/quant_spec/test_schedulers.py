"""The table of schedulers says what the installed diffusers does, class by class."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from quant_spec.schedulers import SCHEDULERS, TAKE_ETA, TAKE_SIGMAS, TAKE_TIMESTEPS, TRAINING_ONLY, Family

# diffusers' own schedulers call numpy on torch tensors in a way that numpy 2 complains of.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

#: Classes that are not in the table, and why.
NOT_THERE = {
    **dict.fromkeys(("AmusedScheduler", "VQDiffusionScheduler"), "discrete tokens"),
    **dict.fromkeys(("BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"), "discrete tokens"),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "from image to noise"),
    **dict.fromkeys(("RePaintScheduler", "KarrasVeScheduler", "CogVideoXDPMScheduler"), "step takes more"),
    **dict.fromkeys(("DDPMWuerstchenScheduler", "PiflowScheduler", "RFD4ProteinaScheduler"), "step takes more"),
    **dict.fromkeys(("HeliosScheduler", "HeliosDMDScheduler"), "stages"),
    "SCMScheduler": "two steps at most",
    "ScoreSdeVeScheduler": "no step",
}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction", "original_sample", "trigflow")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


def installed() -> dict[str, Any]:
    """Return every scheduler class of diffusers that this environment can load."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return {
        name: cls
        for name, cls in found.items()
        if isinstance(cls, type) and issubclass(cls, SchedulerMixin) and cls.__module__.startswith("diffusers.")
    }


def test_every_scheduler_of_diffusers_is_in_the_table_or_left_out_for_a_reason() -> None:
    assert installed().keys() == SCHEDULERS.keys() | NOT_THERE.keys()
    assert not SCHEDULERS.keys() & NOT_THERE.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_fields_and_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(installed()[name].__init__).parameters
    assert SCHEDULERS[name].fields == {key: value.default for key, value in parameters.items() if key != "self"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_prediction_types_are_those_that_step_takes(name: str) -> None:
    if "prediction_type" not in SCHEDULERS[name].fields:
        assert not SCHEDULERS[name].predictions
        assert runs(name, {})
        return
    assert {kind for kind in PREDICTIONS if runs(name, {"prediction_type": kind})} == SCHEDULERS[name].predictions


@pytest.mark.parametrize("name", SCHEDULERS)
def test_beta_schedules_are_those_that_can_be_made(name: str) -> None:
    if "beta_schedule" not in SCHEDULERS[name].fields:
        assert not SCHEDULERS[name].beta_schedules
        return
    made = set()
    for schedule in BETA_SCHEDULES:
        try:
            installed()[name](beta_schedule=schedule)
        except (NotImplementedError, ValueError):
            continue
        made.add(schedule)
    assert made == SCHEDULERS[name].beta_schedules


def runs(name: str, config: dict[str, Any]) -> bool:
    """Whether a scheduler comes from noise to finite samples in 4 steps."""
    try:
        scheduler = installed()[name].from_config(config)
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        x = x * float(getattr(scheduler, "init_noise_sigma", 1))
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        takes = "generator" in inspect.signature(scheduler.step).parameters
        for timestep in scheduler.timesteps:
            prediction = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            extra = {"generator": generators} if takes else {}
            x = scheduler.step(0.9 * prediction, timestep, x, return_dict=False, **extra)[0]
    except (NotImplementedError, ValueError):
        return False
    return bool(x.isfinite().all())


def test_training_schedules_are_in_the_table() -> None:
    for trained, sampled in TRAINING_ONLY.items():
        assert SCHEDULERS[trained].family is SCHEDULERS[sampled].family is Family.DIFFUSION
        assert SCHEDULERS[trained].fields.keys() - SCHEDULERS[sampled].fields.keys() == {"variance_type"}


def test_the_classes_that_take_eta() -> None:
    takes = {name for name in SCHEDULERS if "eta" in inspect.signature(getattr(diffusers, name).step).parameters}
    assert takes == TAKE_ETA


def test_who_takes_timesteps_and_sigmas_is_written_down() -> None:
    takes = {name: inspect.signature(installed()[name].set_timesteps).parameters for name in SCHEDULERS}
    assert {name for name, parameters in takes.items() if "timesteps" in parameters} == TAKE_TIMESTEPS
    assert {name for name, parameters in takes.items() if "sigmas" in parameters} == TAKE_SIGMAS
