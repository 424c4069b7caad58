"""What a scheduler that a recipe names gets from the model's own config, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from quant_spec.errors import QuantizationError
from quant_spec.scheduler_choice import choose_scheduler, default_scheduler
from quant_spec.schedulers import SCHEDULERS

DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "scaled_linear", "beta_end": 0.012}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def of(name: str, **fields: Any) -> dict[str, Any]:
    return {"_class_name": name, **fields}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_models_own_scheduler_is_taken_as_it_is(name: str) -> None:
    choice = choose_scheduler(None, of(name))
    assert (choice.name, choice.config, choice.note) == (name, of(name), None)
    assert choose_scheduler(name, of(name)).note is None


@pytest.mark.parametrize(
    ("own", "default"),
    [
        (of("DDPMScheduler"), "DDIMScheduler"),
        (of("DDPMParallelScheduler"), "DDIMScheduler"),
        (of("DDPMScheduler", beta_schedule="sigmoid"), "DDPMScheduler"),  # DDIM knows no sigmoid
        (DPM, "DPMSolverMultistepScheduler"),
        (FLOW, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_default_is_the_models_own_or_ddim_for_a_training_schedule(own: dict[str, Any], default: str) -> None:
    assert default_scheduler(own) == default


def test_ddim_for_a_training_schedule_has_the_same_fields() -> None:
    own = of("DDPMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="v_prediction")
    choice = choose_scheduler("DDIMScheduler", own)
    assert choice.note is None
    assert {name: choice.config[name] for name in own} == own
    # where diffusers' DDPM clips by default, so does its model's DDIM
    assert choose_scheduler("DDIMScheduler", of("DDPMScheduler")).config["clip_sample"] is True


def test_clipping_is_off_unless_the_model_or_the_user_says_so() -> None:
    choice = choose_scheduler("DDIMScheduler", DPM)
    assert choice.config["clip_sample"] is False
    assert choice.note == (
        "sampler: DDIMScheduler instead of the model's DPMSolverMultistepScheduler: set_alpha_to_one=true, "
        "timestep_spacing=leading (from DDIMScheduler's defaults); clip_sample=false (nothing in the model's config "
        "clips)"
    )
    wanted = choose_scheduler("DDIMScheduler", DPM, {"clip_sample": True, "set_alpha_to_one": False})
    assert wanted.config["clip_sample"] is True
    assert wanted.note == (
        "sampler: DDIMScheduler instead of the model's DPMSolverMultistepScheduler: clip_sample_range=1.0, "
        "timestep_spacing=leading (from DDIMScheduler's defaults)"
    )


def test_training_fields_come_from_the_models_class_where_its_config_leaves_them_out() -> None:
    # beta_start is 0.0001 in DPMSolverMultistepScheduler, 0.00085 in HeunDiscreteScheduler
    assert choose_scheduler("HeunDiscreteScheduler", DPM).config["beta_start"] == 0.0001


def test_a_model_without_a_config_must_be_told_how_it_was_trained() -> None:
    with pytest.raises(QuantizationError, match=r"got null for a model without scheduler/scheduler_config\.json"):
        default_scheduler(None)
    with pytest.raises(
        QuantizationError, match=r"does not say num_train_timesteps, .* wanted them in .*sampler.options"
    ):
        choose_scheduler("DDIMScheduler", None)
    told = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2"}
    note = choose_scheduler("DDIMScheduler", None, told).note
    assert note is not None
    assert "for a model without a scheduler config: set_alpha_to_one=true" in note


def test_flow_matching_goes_from_class_to_class_with_its_shift() -> None:
    choice = choose_scheduler("UniPCMultistepScheduler", FLOW)
    expected = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    assert {name: choice.config[name] for name in expected} == expected
    back = choose_scheduler("FlowMatchHeunDiscreteScheduler", of("UniPCMultistepScheduler", **expected))
    assert back.config["shift"] == 3.0


@pytest.mark.parametrize(
    ("name", "own", "options", "message"),
    [
        ("DDIMScheduler", FLOW, {}, r"got DDIMScheduler \(diffusion\) for a model of FlowMatch.* \(flow matching\)"),
        ("FlowMatchEulerDiscreteScheduler", DPM, {}, r"\(flow matching\) for a model of DPM.* \(diffusion\)"),
        ("UniPCMultistepScheduler", DPM, {"use_flow_sigmas": True}, r"\(flow matching\) for a model of DPM"),
        ("DPMSolverMultistepScheduler", DPM, {"use_flow_sigmas": True}, r"\(flow matching\) for a model of DPM"),
        ("DDIMScheduler", of("EDMEulerScheduler"), {}, r"\(diffusion\) for a model of EDM.* \(EDM\)"),
        ("DDIMScheduler", of("LCMScheduler"), {}, r"for a model of LCMScheduler \(latent consistency\)"),
        ("LCMScheduler", DPM, {}, r"got LCMScheduler \(latent consistency\) for a model of DPM"),
        ("IPNDMScheduler", DPM, {}, r"got IPNDMScheduler \(of its own kind\)"),
        ("FlowMatchLCMScheduler", of("IPNDMScheduler"), {}, "wanted null, which is that$"),
        (
            "DDIMScheduler",
            of("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction"),
            {},
            r"\(continuous timesteps\)",
        ),
        ("PNDMScheduler", of("DDIMScheduler", prediction_type="sample"), {}, "got PNDMScheduler for prediction_type"),
        ("PNDMScheduler", of("DDIMScheduler", rescale_betas_zero_snr=True), {}, "has no rescale_betas_zero_snr"),
        ("DDIMScheduler", of("CogVideoXDDIMScheduler"), {}, "which has no snr_shift_scale"),
        ("DDIMScheduler", of("DDPMScheduler", beta_schedule="sigmoid"), {}, "DDIMScheduler for beta_schedule=sigmoid"),
        ("DDIMScheduler", of("MyScheduler"), {}, "whose own is MyScheduler, of which it is not known what fits"),
        ("DDIMSheduler", DPM, {}, "got 'DDIMSheduler', wanted .*; the nearest is DDIMScheduler"),
        ("DDIMInverseScheduler", DPM, {}, "got 'DDIMInverseScheduler', wanted a scheduler class"),
        ("DDIMScheduler", DPM, {"clip_samples": True}, "got 'clip_samples', wanted .*; the nearest is clip_sample"),
        (None, of("DDPMScheduler", prediction_type="velocity"), {}, "for prediction_type=velocity"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str | None, own: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(QuantizationError, match=message) as caught:
        choose_scheduler(name, own, options)
    assert "wanted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_class_fits_by_what_its_config_says() -> None:
    own = of("MyScheduler", prediction_type="v_prediction", num_train_timesteps=500, **BETAS)
    choice = choose_scheduler("DDIMScheduler", own)
    assert choice.config["prediction_type"] == "v_prediction"
    with pytest.raises(QuantizationError, match="got null for a model whose own is MyScheduler"):
        default_scheduler(own)


@pytest.mark.parametrize(
    "fields",
    [
        *({"beta_start": value} for value in (-0.1, 2, "0.0001", "nan", float("inf"), None, 10**400)),
        *({"trained_betas": value} for value in ([], [0.1, 2.0], ["a"], 0.1)),
        *({"num_train_timesteps": value} for value in (0, 10**9, "1000", None)),
        *({"clip_sample_range": value, "clip_sample": True} for value in ([1.0], True)),
    ],
    ids=str,
)
def test_numbers_that_no_scheduler_can_use_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match=next(iter(fields))):
        choose_scheduler(None, of("DDIMScheduler", **fields))


def test_numbers_that_do_not_matter_are_no_reason_to_refuse() -> None:
    unread = {"beta_start": None, "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": None, "clip_sample": False}
    assert choose_scheduler(None, of("DDIMScheduler", **unread)).name == "DDIMScheduler"
    # -Infinity is the class's own default, which an inspection has as text.
    assert choose_scheduler(None, of("DPMSolverMultistepScheduler", lambda_min_clipped="-inf")).note is None
