"""Run a sampler once, from seeds to samples, and show every denoiser call to whoever asks.

Each seed has its own generator, for its initial noise and for the noise that stochastic samplers add, so a sample does
not depend on which others are in its batch (beyond the rounding of batched arithmetic).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

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
from quant_spec.errors import QuantizationError


@dataclass(frozen=True, slots=True)
class SamplerSpec:
    """How samples are drawn; JSON-able, part of every metric's protocol.

    Attributes
    ----------
    scheduler : str | None
        Class name in diffusers; None is the model's own.
    num_inference_steps : int
    eta : float
        Share of DDPM's noise in DDIM-like schedulers, 0 to 1; others ignore it.
    guidance_scale : float
        Classifier-free guidance; 1 calls the denoiser once per step.
    null_class : int | None
        Label that means "no class", if it is not the embedding's extra row.
    timestep_scale : float
        What the denoiser gets per unit of the scheduler's timestep (0.001 for networks that take it in [0, 1]).
    mu : float | None
        Resolution shift for schedulers with dynamic shifting; None computes it from the number of tokens.
    options : mapping
        Overrides of the scheduler's config (`timestep_spacing`, `use_karras_sigmas`, …).
    """

    scheduler: str | None = None
    num_inference_steps: int = 20
    eta: float = 0.0
    guidance_scale: float = 1.0
    null_class: int | None = None
    timestep_scale: float = 1.0
    mu: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise QuantizationError(f"num_inference_steps: got {self.num_inference_steps}, wanted at least 1")
        if not 0 <= self.eta <= 1:
            raise QuantizationError(f"eta: got {self.eta}, wanted 0 to 1")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; missing entries take their defaults."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return asdict(self) | {"options": dict(self.options)}

    def tell(self, timestep: Tensor) -> Tensor:
        """Return what the denoiser is told for a timestep of the scheduler."""
        return timestep if self.timestep_scale == 1.0 else timestep * self.timestep_scale

    @property
    def is_guided(self) -> bool:
        """Whether each step calls the denoiser with and without the condition."""
        return self.guidance_scale != 1.0


def make_scheduler(spec: SamplerSpec, scheduler_config: Mapping[str, Any] | None) -> Any:
    """Build the diffusers scheduler that `spec` names from the model's scheduler config.

    Raises
    ------
    QuantizationError
        If diffusers has no such scheduler, neither the spec nor the model names one, or the config holds a correction
        for another scheduler.
    """
    import diffusers

    config = dict(scheduler_config or {})
    if is_corrected(config):
        return _corrected(spec, config)
    name = spec.scheduler or config.get("_class_name")
    if name is None:
        raise QuantizationError("sampler: the model has no scheduler config, wanted sampler.scheduler")
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and hasattr(cls, "set_timesteps") and hasattr(cls, "step")):
        raise QuantizationError(
            f"sampler.scheduler: got {name!r}, wanted a scheduler class of diffusers {diffusers.__version__}"
        )
    if str(config.get("variance_type", "")).startswith("learned"):
        config["variance_type"] = "fixed_small"  # call_denoiser drops the learned variance's channels
    scheduler: Any = cls.from_config(config | dict(spec.options))  # type: ignore[attr-defined]
    return scheduler


def _corrected(spec: SamplerSpec, config: Mapping[str, Any]) -> QuantmillCorrectedScheduler:
    """Build a corrected scheduler, of the wrapped class that the spec must not contradict."""
    wrapped, tables = unwrap_config(config)
    if spec.scheduler not in (None, wrapped["_class_name"]):
        raise QuantizationError(
            f"sampler.scheduler: got {spec.scheduler}, wanted {wrapped['_class_name']}, which the model's predictions "
            "are corrected for"
        )
    scheduler = make_scheduler(spec, wrapped)
    return QuantmillCorrectedScheduler.around(scheduler, tables)


def start(scheduler: Any, spec: SamplerSpec, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Set a scheduler's timesteps for samples of `shape` and return them, shape (S,), in the order of sampling."""
    arguments: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = _shift(scheduler.config, shape) if spec.mu is None else spec.mu
    scheduler.set_timesteps(spec.num_inference_steps, device=device, **arguments)
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


class Predict(Protocol):
    """Gives the prediction of a step for a batch of seeds instead of the denoiser."""

    def __call__(self, index: int, row: int, x: Tensor, told: Tensor, conditioning: Conditioning, /) -> Tensor:
        """Return what the denoiser would; the arguments are as in `Step`."""


def trajectory_conditioning(
    model: nn.Module, spec: SamplerSpec, seeds: Sequence[int], file: Path | None
) -> dict[str, Tensor]:
    """Draw what the denoiser is called with for each seed, with guidance's unconditional rows in between."""
    conditioning = draw_conditioning(model, seeds, file)
    if not spec.is_guided:
        return conditioning
    return interleave(conditioning, null_conditioning(model, conditioning, file, spec.null_class))


def sample(
    model: nn.Module,
    scheduler: Any,
    spec: SamplerSpec,
    seeds: Sequence[int],
    conditioning: Conditioning,
    *,
    batch_size: int,
    on_step: OnStep | None = None,
    predict: Predict | None = None,
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
    predict : callable, optional
        Stands in for calls of `model`, which then only says what samples look like.

    Returns
    -------
    Tensor, shape (len(seeds), ...), dtype float32, on the CPU
        Images in [-1, 1] or latents.

    Raises
    ------
    NotFiniteError
        At the first step where the model or the scheduler gives NaN or infinity.
    """
    rows = 2 if spec.is_guided else 1
    results = []
    for first in range(0, len(seeds), batch_size):
        batch = seeds[first : first + batch_size]
        part = take(conditioning, slice(rows * first, rows * (first + len(batch))))
        own = copy.deepcopy(scheduler)
        results.append(_sample_batch(model, own, spec, batch, part, rows * first, on_step, predict))
    return torch.cat(results)


@torch.no_grad()
def _sample_batch(
    model: nn.Module,
    scheduler: Any,
    spec: SamplerSpec,
    seeds: Sequence[int],
    conditioning: Conditioning,
    row: int,
    on_step: OnStep | None,
    predict: Predict | None,
) -> Tensor:
    device = next(model.parameters(), next(model.buffers(), torch.empty(0))).device
    conditioning = to_device(conditioning, device)
    shape = sample_shape(model, token_count(conditioning))
    timesteps = start(scheduler, spec, shape, device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    x = x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x
    extra = _step_arguments(scheduler, spec, generators)
    for index, timestep in enumerate(timesteps):
        x_in = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x_in = x_in.repeat_interleave(2, dim=0) if spec.is_guided else x_in
        told = spec.tell(timestep)
        if predict is None:
            prediction = call_denoiser(model, x_in, told, conditioning)
        else:
            prediction = predict(index, row, x_in, told, conditioning)
        if on_step is not None:
            on_step(Step(index, told, row, x_in, conditioning, prediction))
        x = scheduler.step(guide(prediction, spec), timestep, x, return_dict=False, **extra)[0]
        check_step(Moment(index, told), x_in, prediction, x, model=model, scheduler=scheduler)
    return x.to("cpu", torch.float32)


def guide(prediction: Tensor, spec: SamplerSpec) -> Tensor:
    """Combine the rows of a prediction by classifier-free guidance: uncond + scale * (cond - uncond)."""
    if not spec.is_guided:
        return prediction
    conditional, unconditional = prediction[0::2], prediction[1::2]
    return unconditional + spec.guidance_scale * (conditional - unconditional)


def token_count(conditioning: Conditioning) -> int | None:
    """Return the number of packed latent tokens, where positions are given."""
    return len(conditioning["img_ids"]) if "img_ids" in conditioning else None


def _step_arguments(scheduler: Any, spec: SamplerSpec, generators: list[torch.Generator]) -> dict[str, Any]:
    """Return the optional arguments that this scheduler's `step` takes."""
    takes = inspect.signature(scheduler.step).parameters
    offered: dict[str, Any] = {"eta": spec.eta, "generator": generators}
    return {name: value for name, value in offered.items() if name in takes}
