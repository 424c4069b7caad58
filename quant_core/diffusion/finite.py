"""Find the step at which a trajectory stops being finite, and say whether the model or the scheduler made it so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.diffusion.denoiser import config_value
from quant_core.errors import NotFiniteError


@dataclass(frozen=True, slots=True)
class Moment:
    """A step of a trajectory: its index, 0 is the noisiest, and the timestep as the denoiser is told it."""

    index: int
    timestep: Tensor | float

    def __str__(self) -> str:
        return f"step {self.index} (timestep {float(self.timestep):g})"


def check_step(
    moment: Moment, x_in: Tensor, prediction: Tensor, x_out: Tensor, *, model: nn.Module, scheduler: Any
) -> None:
    """Check that a step of the sampler gave finite numbers.

    Parameters
    ----------
    x_in, prediction, x_out : Tensor
        What the denoiser got and gave, and what the scheduler made of it.
    model, scheduler
        To be named in the message.

    Raises
    ------
    NotFiniteError
        If a number is NaN or infinite. The message names the scheduler if the model's input was not finite already, or
        if it predicted finite numbers; else the model.
    """
    if bool(torch.isfinite(prediction).all() & torch.isfinite(x_out).all()):
        return
    if bool(torch.isfinite(x_in).all()) and not bool(torch.isfinite(prediction).all()):
        raise _predicted(f"sampler gives NaN or infinity at {moment}", model)
    raise NotFiniteError(
        f"sampler gives NaN or infinity at {moment}: {type(scheduler).__name__} made it, {model_label(model)} did not; "
        f"wanted finite samples: {advice(scheduler)}"
    )


def check_prediction(moment: Moment, prediction: Tensor, model: nn.Module) -> None:
    """Check what a model predicted from inputs of a full-precision trajectory; NotFiniteError names the model."""
    if not bool(torch.isfinite(prediction).all()):
        raise _predicted(f"prediction is NaN or infinity at {moment}", model)


def model_label(model: nn.Module) -> str:
    """Return what messages call a model: its class, and whether it is quantized."""
    name = type(model).__name__
    return name if config_value(model, "quantization_config") is None else f"the quantized {name}"


def _predicted(what: str, model: nn.Module) -> NotFiniteError:
    """Return the error of a model that predicted this from finite inputs."""
    is_quantized = config_value(model, "quantization_config") is not None
    advice = "more bits or other ranges" if is_quantized else "weights and conditioning that it was trained with"
    return NotFiniteError(
        f"{what}: {model_label(model)} predicted it from finite inputs; wanted finite predictions: {advice}"
    )


def advice(scheduler: Any) -> str:
    """Return what to change in the recipe."""
    config = scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        return (
            "sampler.options {rescale_betas_zero_snr: false} or {timestep_spacing: leading}, as epsilon prediction "
            "divides by the signal, which is zero at the last timestep"
        )
    return "a sampler.scheduler and sampler.options that fit how the model was trained"
