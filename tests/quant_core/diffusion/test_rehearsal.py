"""Samplers without a model: which give NaN of any prediction, and that those which are not tried do not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from diffusers import DDPMScheduler

from quant_core.diffusion.rehearsal import rehearse
from quant_core.errors import NotFiniteError
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler
from quant_spec.scheduler_choice import choose_scheduler, is_plain
from quant_spec.schedulers import SCHEDULERS, Family

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers' schedulers
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}


def tried(name: str, options: dict[str, Any], steps: int) -> int:
    """Rehearse a class with its defaults and some fields."""
    config = {"_class_name": name, **SCHEDULERS[name].fields, **options}
    return rehearse(Sampler(scheduler=name, num_inference_steps=steps), config)


@pytest.mark.parametrize(
    ("name", "options", "steps", "message"),
    [
        ("DDIMScheduler", ZERO_SNR, 20, r"NaN or infinity at step 0 \(timestep 999\): DDIMScheduler makes it of any"),
        ("DDPMScheduler", ZERO_SNR, 20, r"NaN or infinity at step 0 \(timestep 999\)"),
        ("LCMScheduler", {"rescale_betas_zero_snr": True}, 4, r"NaN or infinity at step 0 \(timestep 999\)"),
        (
            "EulerAncestralDiscreteScheduler",
            {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"},
            4,
            r"NaN or infinity at step 0 \(timestep 999\)",
        ),
        ("PNDMScheduler", {}, 2, r"got PNDMScheduler for num_inference_steps=2, which raised ValueError"),
        ("UnCLIPScheduler", {}, 1, r"got UnCLIPScheduler for num_inference_steps=1, which raised ZeroDivisionError"),
        ("DDIMScheduler", {"steps_offset": 1000}, 20, r"which raised IndexError at step 0 \(timestep 1950\)"),
    ],
)
def test_samplers_that_give_no_samples_are_refused(
    name: str, options: dict[str, Any], steps: int, message: str
) -> None:
    config = {"_class_name": name, **SCHEDULERS[name].fields, **options}
    assert not is_plain(choose_scheduler(None, config), steps)
    with pytest.raises((NotFiniteError, QuantizationError), match=message):
        tried(name, options, steps)


def test_zero_signal_is_no_matter_where_it_is_not_divided_by() -> None:
    assert tried("DDIMScheduler", ZERO_SNR | {"prediction_type": "v_prediction"}, 20) == 20
    assert tried("DDIMScheduler", ZERO_SNR | {"timestep_spacing": "leading"}, 20) == 20
    assert tried("DDIMScheduler", ZERO_SNR | {"clip_sample": True}, 20) == 20


def test_a_learned_variance_is_predicted_too() -> None:
    config = DDPMScheduler(variance_type="learned_range", rescale_betas_zero_snr=True, clip_sample=True).config
    assert rehearse(Sampler(scheduler="DDPMScheduler", num_inference_steps=3), dict(config)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, each in SCHEDULERS.items() if each.family is not Family.ALONE])
def test_what_is_not_tried_gives_samples(name: str) -> None:
    entry = SCHEDULERS[name]
    axes: dict[str, list[Any]] = {
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "prediction_type": sorted(entry.predictions - {"flow_prediction"}),
        "beta_schedule": sorted(entry.beta_schedules),
        "clip_sample": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
    }
    axes = {field: values for field, values in axes.items() if field in entry.fields and values}
    plain = 0
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        for steps in (1, 2, 4, 20, 50):
            if entry.family in (Family.DIFFUSION, Family.CONSISTENCY) and is_plain(
                choose_scheduler(None, {"_class_name": name, **entry.fields, **options}), steps
            ):
                plain += 1
                tried(name, options, steps)
    assert plain or entry.family not in (Family.DIFFUSION, Family.CONSISTENCY)
