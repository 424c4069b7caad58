"""Run a sampler once, from seeds to samples; a callback can see every denoiser call.

Each seed has its own generator, for its initial noise and for the noise that stochastic samplers add, so a sample does
not depend on which others are in its batch (beyond the rounding of batched arithmetic).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import (
    Conditioning,
    draw_conditioning,
    interleave,
    null_conditioning,
    take,
    to_device,
)
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler, is_corrected, unwrap_config
from quant_core.diffusion.denoiser import call_denoiser, sample_shape
from quant_core.diffusion.finite import Moment, check_step
from quant_core.diffusion.scheduler import build_scheduler
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler


def model_timestep(timestep: Tensor, sampler: Sampler) -> Tensor:
    """Return the timestep that the denoiser is called with, in units of its own, for one of the scheduler's."""
    return timestep if sampler.timestep_scale == 1.0 else timestep * sampler.timestep_scale


def make_scheduler(sampler: Sampler, scheduler_config: Mapping[str, Any] | None) -> Any:
    """Build the diffusers scheduler that `sampler` names from the model's scheduler config.

    Raises
    ------
    QuantizationError
        If neither the sampler nor the model names a scheduler, it does not fit the model, or the config holds a
        correction for another scheduler.
    """
    config = dict(scheduler_config or {})
    if is_corrected(config):
        return _corrected(sampler, config)
    return build_scheduler(sampler.scheduler, config, sampler.options)


def _corrected(sampler: Sampler, config: Mapping[str, Any]) -> QuantmillCorrectedScheduler:
    """Build a corrected scheduler, of the wrapped class, which the sampler must not contradict."""
    wrapped, tables = unwrap_config(config)
    if sampler.scheduler not in (None, wrapped["_class_name"]):
        raise QuantizationError(
            f"sampler.scheduler: got {sampler.scheduler}, wanted {wrapped['_class_name']}, which the model's "
            "predictions are corrected for"
        )
    scheduler = make_scheduler(sampler, wrapped)
    return QuantmillCorrectedScheduler.around(scheduler, tables)


def start(scheduler: Any, sampler: Sampler, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Set a scheduler's timesteps for samples of `shape` and return them, shape (S,), in the order of sampling."""
    arguments: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = _shift(scheduler.config, shape) if sampler.mu is None else sampler.mu
    scheduler.set_timesteps(sampler.num_inference_steps, device=device, **arguments)
    return scheduler.timesteps


def _shift(config: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """Return the shift `mu` for a number of image tokens, linear between the config's two anchors (as for Flux)."""
    tokens = shape[0] if len(shape) == 2 else math.prod(shape[1:]) // 4  # latents are cut into 2x2 patches
    base, top = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - base) / (top - base)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the sampler for one batch of seeds: exactly what the denoiser got and gave.

    Attributes
    ----------
    index : int
        Of the trajectory step, 0 is the noisiest.
    timestep : Tensor, shape ()
        As the denoiser got it.
    row : int
        Position of the first row of `x` among the rows of all seeds.
    x : Tensor, shape (R, ...), dtype float32
        Inputs; R is the number of seeds, or twice that with guidance (rows: seed 0 with, seed 0 without the condition,
        …).
    conditioning : mapping of str to Tensor, R rows
    prediction : Tensor, shape as `x`
        The denoiser's output, before guidance.
    """

    index: int
    timestep: Tensor
    row: int
    x: Tensor
    conditioning: Conditioning
    prediction: Tensor


class OnStep(Protocol):
    """Receives every step; the tensors must be copied to be kept."""

    def __call__(self, step: Step, /) -> None: ...


class Ask(Protocol):
    """Computes a denoiser's output for the call at hand, or that of another network of the same arguments."""

    def __call__(self, other: nn.Module | None = None, /) -> Any: ...


class Instead(Protocol):
    """Stands between a sampler and its denoiser."""

    def __call__(self, index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
        """Return what the denoiser would, for a batch of seeds; `index`, `row` and `x` are as in `Step`.

        In a whole pipeline the output is as the denoiser's forward gives it, and rows are in the pipeline's order.
        """


def trajectory_conditioning(
    model: nn.Module, sampler: Sampler, seeds: Sequence[int], file: Path | None
) -> dict[str, Tensor]:
    """Draw what the denoiser is called with for each seed, with guidance's unconditional rows in between."""
    conditioning = draw_conditioning(model, seeds, file)
    if not sampler.is_guided:
        return conditioning
    return interleave(conditioning, null_conditioning(model, conditioning, file, sampler.null_class))


def sample(
    model: nn.Module,
    scheduler: Any,
    sampler: Sampler,
    seeds: Sequence[int],
    conditioning: Conditioning,
    *,
    batch_size: int,
    on_step: OnStep | None = None,
    instead: Instead | None = None,
) -> Tensor:
    """Draw one sample per seed, in one pass of the sampler.

    Parameters
    ----------
    scheduler
        From `make_scheduler`; it is not changed.
    conditioning
        From `trajectory_conditioning` for the same seeds.
    batch_size : int
        Seeds per denoiser call.
    on_step : callable, optional
        Called after every denoiser call.
    instead : callable, optional
        Stands between the sampler and `model`.

    Returns
    -------
    Tensor, shape (len(seeds), ...), dtype float32, on the CPU
        Images in [-1, 1] or latents.

    Raises
    ------
    NotFiniteError
        At the first step where the model or the scheduler gives NaN or infinity.
    """
    rows = sampler.calls_per_step
    results = []
    for first in range(0, len(seeds), batch_size):
        batch = seeds[first : first + batch_size]
        part = take(conditioning, slice(rows * first, rows * (first + len(batch))))
        own = copy.deepcopy(scheduler)
        results.append(_sample_batch(model, own, sampler, batch, part, rows * first, on_step, instead))
    return torch.cat(results)


@torch.no_grad()
def _sample_batch(
    model: nn.Module,
    scheduler: Any,
    sampler: Sampler,
    seeds: Sequence[int],
    conditioning: Conditioning,
    row: int,
    on_step: OnStep | None,
    instead: Instead | None,
) -> Tensor:
    device = next(model.parameters(), next(model.buffers(), torch.empty(0))).device
    conditioning = to_device(conditioning, device)
    shape = sample_shape(model, token_count(conditioning))
    timesteps = start(scheduler, sampler, shape, device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    extra = step_arguments(scheduler, sampler, generators)
    for index, timestep in enumerate(timesteps):
        x_in = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x_in = x_in.repeat_interleave(2, dim=0) if sampler.is_guided else x_in
        t = model_timestep(timestep, sampler)
        ask = _asking(model, x_in, t, conditioning)
        prediction = ask() if instead is None else instead(index, row, x_in, ask)
        if on_step is not None:
            on_step(Step(index, t, row, x_in, conditioning, prediction))
        x = scheduler.step(guide(prediction, sampler), timestep, x, return_dict=False, **extra)[0]
        check_step(Moment(index, t), x_in, prediction, x, model=model, scheduler=scheduler)
    return x.to("cpu", torch.float32)


def _asking(model: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Ask:
    """Return what computes the prediction of one call."""
    return lambda other=None, /: call_denoiser(model if other is None else other, x, t, conditioning)


def guide(prediction: Tensor, sampler: Sampler) -> Tensor:
    """Combine the rows of a prediction by classifier-free guidance: uncond + scale * (cond - uncond)."""
    scale = sampler.guidance_scale
    if scale is None or not sampler.is_guided:
        return prediction
    conditional, unconditional = prediction[0::2], prediction[1::2]
    return unconditional + scale * (conditional - unconditional)


def token_count(conditioning: Conditioning) -> int | None:
    """Return the number of packed latent tokens, where positions are given."""
    return len(conditioning["img_ids"]) if "img_ids" in conditioning else None


def step_arguments(scheduler: Any, sampler: Sampler, generators: list[torch.Generator]) -> dict[str, Any]:
    """Return the optional arguments that this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    offered: dict[str, Any] = {"eta": sampler.eta, "generator": generators}
    return {name: value for name, value in offered.items() if name in takes}
