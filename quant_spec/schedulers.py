"""diffusers' schedulers as a table: what each takes, with its defaults, and which models it samples from.

A scheduler is chosen before anything may import torch, so what decides whether it fits a model is written down here; a
test compares every row with the installed diffusers. Not in the table, so refused: schedulers of discrete tokens, those
that turn an image into noise, and those whose `step` needs more than a prediction, a timestep and a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Family(StrEnum):
    """What a denoiser was trained to predict, and how it is told the noise level; schedulers of another don't fit."""

    DIFFUSION = "diffusion"  # noise levels of a table of betas, told by their index
    FLOW = "flow matching"  # the velocity from data to noise
    EDM = "EDM"  # continuous noise levels, preconditioned by the data's deviation
    CONTINUOUS = "continuous timesteps"  # v-prediction, told a quarter of the logarithm of the noise level
    CONSISTENCY = "latent consistency"  # distilled to few steps
    ALONE = "of its own kind"  # a model for this scheduler fits no other


@dataclass(frozen=True, slots=True)
class SchedulerClass:
    """A scheduler class of diffusers.

    Attributes
    ----------
    family
        Of models whose config says nothing else; with `use_flow_sigmas` it is flow matching.
    fields
        What its config holds, with the class's defaults.
    predictions
        Values of `prediction_type` that its `step` can use; empty if it has no such field.
    beta_schedules
        Values of `beta_schedule` that it can make; empty if it has no such field.
    """

    family: Family
    fields: dict[str, Any]
    predictions: frozenset[str] = frozenset()
    beta_schedules: frozenset[str] = frozenset()


_TRAIN = {"num_train_timesteps": 1000}
_BETAS = _TRAIN | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None}
_LATENT_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_EPSILON = {"prediction_type": "epsilon"}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_TERMINAL_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW_SIGMAS = {"use_flow_sigmas": False, "flow_shift": 1.0}
_DYNAMIC = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_SECOND_ORDER = {"solver_order": 2, "lower_order_final": True}
_CLIPPED_LAMBDA = {"lambda_min_clipped": float("-inf"), "variance_type": None}
_FINAL_ZERO = {"final_sigmas_type": "zero"}
_TO_ONE = {"set_alpha_to_one": True}

_DDIM = _BETAS | _EPSILON | _CLIP | _THRESHOLD | _TO_ONE | _LEADING | _TERMINAL_SNR
_DDPM = _BETAS | _EPSILON | _CLIP | _THRESHOLD | _LEADING | _TERMINAL_SNR | {"variance_type": "fixed_small"}
_COGVIDEOX = _LATENT_BETAS | {
    **({"beta_schedule": "scaled_linear", "sample_max_value": 1.0, "snr_shift_scale": 3.0} | _EPSILON),
    **(_CLIP | _TO_ONE | _LEADING | _TERMINAL_SNR),
}
_DPM = (
    _BETAS | _EPSILON | _THRESHOLD | _SIGMAS | _FLOW_SIGMAS | _SECOND_ORDER | _CLIPPED_LAMBDA | _FINAL_ZERO | _DYNAMIC
)
_DPM |= {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
_UNIPC = _BETAS | _EPSILON | _THRESHOLD | _SIGMAS | _FLOW_SIGMAS | _SECOND_ORDER | _FINAL_ZERO | _DYNAMIC | _LINSPACE
_UNIPC |= _TERMINAL_SNR | {"solver_type": "bh2", "predict_x0": True, "disable_corrector": [], "solver_p": None}
_UNIPC |= {"sigma_min": None, "sigma_max": None, "shift_terminal": None}
_DEIS = _BETAS | _EPSILON | _THRESHOLD | _SIGMAS | _FLOW_SIGMAS | _SECOND_ORDER | _DYNAMIC | _LINSPACE
_DEIS |= {"algorithm_type": "deis", "solver_type": "logrho"}
_SASOLVER = _BETAS | _EPSILON | _THRESHOLD | _SIGMAS | _FLOW_SIGMAS | _CLIPPED_LAMBDA | _LINSPACE
_SASOLVER |= {"algorithm_type": "data_prediction", "predictor_order": 2, "corrector_order": 2, "tau_func": None}
_SASOLVER |= {"lower_order_final": True}
_EULER = _BETAS | _EPSILON | _SIGMAS | _LINSPACE | _TERMINAL_SNR | _FINAL_ZERO
_EULER |= {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None}
_LCM = _LATENT_BETAS | _EPSILON | _NO_CLIP | _THRESHOLD | _TO_ONE | _LEADING | _TERMINAL_SNR
_LCM |= {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0}
_EDM = _TRAIN | _EPSILON | _FINAL_ZERO | {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
_EDM |= {"sigma_schedule": "karras", "rho": 7.0}
_FLOW = (
    _TRAIN
    | _SIGMAS
    | _DYNAMIC
    | {
        **{"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
        **{"invert_sigmas": False, "shift_terminal": None},
    }
)

_NOISE = frozenset({"epsilon", "v_prediction"})
_ANY = _NOISE | {"sample"}
_ANY_OR_FLOW = _ANY | {"flow_prediction"}
_USUAL = frozenset({"linear", "scaled_linear", "squaredcos_cap_v2"})
_TRAINING = _USUAL | {"sigmoid", "laplace"}


def _diffusion(
    fields: dict[str, Any], predictions: frozenset[str] = _ANY, beta_schedules: frozenset[str] = _USUAL
) -> SchedulerClass:
    return SchedulerClass(Family.DIFFUSION, fields, predictions, beta_schedules)


#: Class name to what it is.
SCHEDULERS: Mapping[str, SchedulerClass] = {
    "DDIMScheduler": _diffusion(_DDIM),
    "DDIMParallelScheduler": _diffusion(_DDIM),
    "DDPMScheduler": _diffusion(_DDPM, beta_schedules=_TRAINING),
    "DDPMParallelScheduler": _diffusion(_DDPM, beta_schedules=_TRAINING),
    "CogVideoXDDIMScheduler": _diffusion(_COGVIDEOX),
    "PNDMScheduler": _diffusion(
        _BETAS | _EPSILON | _LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False}, _NOISE
    ),
    "DPMSolverMultistepScheduler": _diffusion(
        _DPM | _LINSPACE | _TERMINAL_SNR | {"euler_at_final": False, "use_lu_lambdas": False}, _ANY_OR_FLOW
    ),
    "DPMSolverSinglestepScheduler": _diffusion(_DPM | {"lower_order_final": False}, _ANY_OR_FLOW),
    "DEISMultistepScheduler": _diffusion(_DEIS, _ANY_OR_FLOW),
    "UniPCMultistepScheduler": _diffusion(_UNIPC, _ANY_OR_FLOW),
    "SASolverScheduler": _diffusion(_SASOLVER, _ANY_OR_FLOW),
    "EulerDiscreteScheduler": _diffusion(_EULER, _ANY | {"original_sample"}),
    "EulerAncestralDiscreteScheduler": _diffusion(_BETAS | _EPSILON | _LINSPACE | _TERMINAL_SNR, _NOISE),
    "HeunDiscreteScheduler": _diffusion(
        _LATENT_BETAS | _EPSILON | _SIGMAS | _NO_CLIP | _LINSPACE, _ANY, _USUAL | {"exp"}
    ),
    "KDPM2DiscreteScheduler": _diffusion(_LATENT_BETAS | _EPSILON | _SIGMAS | _LINSPACE, _NOISE),
    "KDPM2AncestralDiscreteScheduler": _diffusion(_LATENT_BETAS | _EPSILON | _SIGMAS | _LINSPACE, _NOISE),
    "LMSDiscreteScheduler": _diffusion(_BETAS | _EPSILON | _SIGMAS | _LINSPACE),
    "UnCLIPScheduler": _diffusion(
        _TRAIN | _EPSILON | _CLIP | {"beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small_log"},
        frozenset({"epsilon", "sample"}),
        frozenset({"squaredcos_cap_v2"}),
    ),
    "LCMScheduler": SchedulerClass(Family.CONSISTENCY, _LCM, _ANY, _USUAL),
    "TCDScheduler": SchedulerClass(Family.CONSISTENCY, _LCM, _ANY, _USUAL),
    "EDMEulerScheduler": SchedulerClass(Family.EDM, _EDM, _NOISE),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        Family.EDM,
        _EDM
        | _SECOND_ORDER
        | _THRESHOLD
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False},
        _NOISE,
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(Family.FLOW, _FLOW | {"stochastic_sampling": False}),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass(Family.FLOW, _TRAIN | {"shift": 1.0}),
    "FlowMatchLCMScheduler": SchedulerClass(Family.ALONE, _FLOW | {"scale_factors": None, "upscale_mode": "bicubic"}),
    "FlowMapEulerDiscreteScheduler": SchedulerClass(Family.ALONE, _TRAIN | {"shift": 1.0}),
    "LTXEulerAncestralRFScheduler": SchedulerClass(Family.ALONE, _TRAIN | {"eta": 1.0, "s_noise": 1.0}),
    "MiniMaxH3Scheduler": SchedulerClass(Family.ALONE, {"shift": 12.0}),
    "IPNDMScheduler": SchedulerClass(Family.ALONE, _TRAIN | {"trained_betas": None}),
    "CMStochasticIterativeScheduler": SchedulerClass(
        Family.ALONE,
        {
            **{"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
            **{"s_noise": 1.0, "rho": 7.0, "clip_denoised": True},
        },
    ),
}

#: Schedules to train with, and what samples from their models by default, with the same fields.
TRAINING_ONLY: Mapping[str, str] = {"DDPMScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDIMScheduler"}

#: Classes that add a share of DDPM's noise, `eta`.
TAKE_ETA = frozenset({"DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "TCDScheduler"})

#: Classes whose `set_timesteps` takes timesteps, and noise levels, of the caller's own.
TAKE_TIMESTEPS = frozenset(
    {
        *("DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
        *("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
        *("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler"),
        *("LTXEulerAncestralRFScheduler", "CMStochasticIterativeScheduler"),
    }
)
TAKE_SIGMAS = frozenset(
    {
        *("UniPCMultistepScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"),
        *("FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler", "LTXEulerAncestralRFScheduler"),
        "MiniMaxH3Scheduler",
    }
)

#: Fields that say how a model was trained, not how it is sampled from.
TRAINED: frozenset[str] = frozenset(
    {
        *{"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"},
        *{"rescale_betas_zero_snr", "snr_shift_scale", "timestep_type", "sigma_data"},
        *{"use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting", "shift_terminal", "invert_sigmas"},
    }
)
#: Fields that cut values off.
CLIPPING: frozenset[str] = frozenset({"clip_sample", "thresholding"})
#: What a scheduler does that has no such field.
WITHOUT: dict[str, Any] = {
    "clip_sample": False,
    "thresholding": False,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 1.0,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
}
#: Fields that mean nothing unless another is true.
_ONLY_WITH: Mapping[str, str] = {
    "clip_sample_range": "clip_sample",
    "flow_shift": "use_flow_sigmas",
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), "thresholding"),
    **dict.fromkeys(("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"), "use_dynamic_shifting"),
    "time_shift_type": "use_dynamic_shifting",
}


def matters(field: str, config: Mapping[str, Any]) -> bool:
    """Whether a field changes what a scheduler with this whole config does, beyond not doing something more."""
    value = config.get(field)
    if field in ("beta_start", "beta_end") and config.get("beta_schedule") == "squaredcos_cap_v2":
        return False
    if field in ("beta_start", "beta_end", "beta_schedule"):
        return config.get("trained_betas") is None and not config.get("use_flow_sigmas")
    if field in _ONLY_WITH:
        return bool(config.get(_ONLY_WITH[field]))
    return value not in (None, [], float("-inf")) and not (value is False and field.startswith("use_"))


def family_of(name: str, config: Mapping[str, Any]) -> Family:
    """Return the family of models that a scheduler of this class and config samples from."""
    if config.get("use_flow_sigmas"):
        return Family.FLOW
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return Family.CONTINUOUS
    return SCHEDULERS[name].family
