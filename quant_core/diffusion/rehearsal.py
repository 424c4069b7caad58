"""A sampler without a model: whether its steps give finite numbers, whatever is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quant_core.diffusion.finite import Moment, advice
from quant_core.diffusion.sampler import make_scheduler, start, step_arguments
from quant_core.errors import NotFiniteError
from quant_spec.errors import QuantizationError, QuantServiceError
from quant_spec.sampler import Sampler

#: Of the sample that stands in for the model's.
_SHAPE = (4, 8, 8)


@torch.no_grad()
def rehearse(sampler: Sampler, scheduler_config: Mapping[str, Any]) -> int:
    """Run a sampler's steps on a small sample, with noise for predictions.

    Returns
    -------
    int
        How many steps there were.

    Raises
    ------
    NotFiniteError
        If a step gives NaN or infinity.
    QuantizationError
        If the scheduler cannot be set to so many steps, or fails at one of them.
    """
    scheduler = make_scheduler(sampler, scheduler_config)
    name = type(scheduler).__name__
    generator = torch.Generator().manual_seed(0)
    at = ""
    try:
        timesteps = start(scheduler, sampler, _SHAPE)
        extra = step_arguments(scheduler, sampler, [generator])
        x = torch.randn(1, *_SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        learns = str(scheduler.config.get("variance_type")).startswith("learned")
        for index, timestep in enumerate(timesteps):
            moment = Moment(index, timestep)
            at = f" at {moment}"
            seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            prediction = torch.randn(1, _SHAPE[0] * (2 if learns else 1), *_SHAPE[1:], generator=generator)
            x = scheduler.step(prediction, timestep, x, return_dict=False, **extra)[0]
            if not bool(torch.isfinite(seen).all() & torch.isfinite(x).all()):
                raise NotFiniteError(
                    f"sampler gives NaN or infinity at {moment}: {name} makes it of any prediction; wanted finite "
                    f"samples: {advice(scheduler)}"
                )
    except QuantServiceError:
        raise
    except Exception as error:  # diffusers' schedulers check little of what they are told
        said = " ".join(str(error).split())
        raise QuantizationError(
            f"sampler: got {name} for num_inference_steps={sampler.num_inference_steps}, which raised "
            f"{type(error).__name__}{at}: {said or 'no more was said'}; wanted another number of steps, or "
            "sampler.scheduler and sampler.options that take it"
        ) from error
    return len(timesteps)
