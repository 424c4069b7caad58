from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from quant_core.diffusion.scheduler import build_scheduler
from quant_spec.errors import QuantizationError
from quant_spec.schedulers import CLIPPING, SCHEDULERS, TRAINED, Family

# diffusers' own schedulers call numpy on torch tensors in a way that numpy 2 complains of.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}


@pytest.mark.parametrize("own", SCHEDULERS)
def test_whatever_fits_keeps_the_models_training_and_clips_no_more(own: str) -> None:
    config: dict[str, Any] = {"_class_name": own}
    if "num_train_timesteps" in SCHEDULERS[own].fields:
        config["num_train_timesteps"] = 100  # some of diffusers' classes compute a second for 1,000
    theirs = build_scheduler(None, config, {}).config
    fitting = []
    for name in SCHEDULERS:
        try:
            ours = build_scheduler(name, config, {}).config
        except QuantizationError:
            continue
        fitting.append(name)
        shared = TRAINED & theirs.keys() & SCHEDULERS[name].fields.keys()
        if SCHEDULERS[own].family is Family.FLOW:
            shared -= {"use_flow_sigmas", "prediction_type"}  # which classes for nothing else don't have
        assert {field: ours[field] for field in shared} == {field: theirs[field] for field in shared}, name
        assert not [field for field in CLIPPING if ours.get(field) and not theirs.get(field)], name
    alone = SCHEDULERS[own].family is Family.ALONE or own == "CogVideoXDDIMScheduler"
    assert own in fitting
    assert (len(fitting) == 1) is alone


def test_latents_are_not_clipped_where_the_models_scheduler_does_not() -> None:
    scheduler = build_scheduler("DDIMScheduler", DPM, {})
    scheduler.set_timesteps(4)
    x = torch.full((1, 4, 2, 2), 9.0)
    last = scheduler.step(torch.zeros_like(x), scheduler.timesteps[-1], x).pred_original_sample
    assert last.min() > 8
    clipping = build_scheduler("DDIMScheduler", DPM, {"clip_sample": True})
    clipping.set_timesteps(4)
    assert clipping.step(torch.zeros_like(x), clipping.timesteps[-1], x).pred_original_sample.max() == 1


def test_own_config_gives_what_diffusers_gives() -> None:
    own: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 1}
    expected = diffusers.EulerDiscreteScheduler.from_config(own)
    assert build_scheduler(None, own, {}).config == expected.config


def test_a_learned_variance_is_not_looked_for() -> None:
    own = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    assert build_scheduler(None, own, {}).config.variance_type == "fixed_small"


def test_a_value_that_the_class_does_not_take_is_an_input_of_ours() -> None:
    with pytest.raises(QuantizationError, match=r"EulerDiscreteScheduler of diffusers .* refuses its config"):
        build_scheduler(
            None,
            {"_class_name": "EulerDiscreteScheduler"},
            {"final_sigmas_type": 1, "use_karras_sigmas": True, "use_beta_sigmas": True},
        )
