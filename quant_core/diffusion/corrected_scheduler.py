"""A diffusers scheduler that corrects the predictions of a quantized model before its own scheduler uses them (PTQD).

scheduler_config.json holds the wrapped scheduler's config as it is, with two entries more: `wrapped_class` and
`correction`. So whoever loads it as the wrapped class gets that, uncorrected, with a warning of diffusers; and

    import quant_core
    scheduler = quant_core.QuantmillCorrectedScheduler.from_pretrained(FOLDER, subfolder="scheduler")

gets both. A pipeline that is saved with it names this module in its model_index.json, and is loaded with it again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Self

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quant_core.diffusion.noise_correction import (
    NoiseCorrection,
    ddim_gain,
    ddpm_gain,
    euler_ancestral_gain,
    noise_scale,
)
from quant_core.errors import UnknownTimestepError
from quant_spec.enums import UnknownTimestep
from quant_spec.errors import QuantizationError

CLASS_NAME = "QuantmillCorrectedScheduler"
#: Where saved pipelines look for it, which stays as it is.
MODULE = "quant_core.corrected_scheduler"
_TOLERANCE = 1e-3  # between a timestep and its table entry


class QuantmillCorrectedScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # untyped bases
    """Any diffusers scheduler, given corrected predictions.

    Everything that is not defined here is the wrapped scheduler's.

    Parameters
    ----------
    wrapped : SchedulerMixin
    correction : NoiseCorrection
        For the timesteps that `wrapped` is used with.
    unknown_timestep : UnknownTimestep
        What to do on a trajectory with other timesteps.
    """

    has_compatibles = False

    def __init__(
        self,
        wrapped: Any,
        correction: NoiseCorrection,
        unknown_timestep: UnknownTimestep = UnknownTimestep.ERROR,
    ) -> None:
        self.wrapped = wrapped
        self.correction = correction
        self.unknown_timestep = UnknownTimestep(unknown_timestep)
        self._takes = frozenset(inspect.signature(wrapped.step).parameters)
        self._grid: Tensor | None = None  # the timesteps that the tables below are for
        self._host_grid: list[float] = []
        self._entries: list[int] = []
        self._divisor = self._bias = torch.empty(0)
        self._noise_scales: dict[float, list[float] | None] = {}
        kept = {key: value for key, value in dict(wrapped.config).items() if not key.startswith("_")}
        tables = correction.to_json() | {"unknown_timestep": str(self.unknown_timestep)}
        self.register_to_config(**kept, wrapped_class=type(wrapped).__name__, correction=tables)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build the wrapped scheduler and its correction from what `save_pretrained` wrote.

        Raises
        ------
        QuantizationError
            If the config holds no correction, or diffusers has no such scheduler.
        """
        wrapped_config, tables = unwrap_config({**config, **kwargs})
        name = wrapped_config["_class_name"]
        wrapped_class = getattr(diffusers, str(name), None)
        if not (isinstance(wrapped_class, type) and hasattr(wrapped_class, "step")):
            raise QuantizationError(f"wrapped_class: got {name!r}, wanted a scheduler class of diffusers")
        scheduler = cls.around(wrapped_class.from_config(wrapped_config), tables)  # type: ignore[attr-defined]
        return (scheduler, {}) if return_unused_kwargs else scheduler

    @classmethod
    def around(cls, wrapped: Any, tables: Mapping[str, Any]) -> Self:
        """Wrap a scheduler; `tables` are those that `unwrap_config` returns."""
        return cls(wrapped, NoiseCorrection.from_json(tables), UnknownTimestep(tables["unknown_timestep"]))

    def __getattr__(self, name: str) -> Any:
        """Look up what is not defined here in the wrapped scheduler."""
        if name.startswith("__") or "wrapped" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.wrapped, name)

    def __len__(self) -> int:
        """Return the number of training timesteps."""
        return len(self.wrapped)

    @property
    def order(self) -> int:
        """Denoiser calls per step."""
        return int(self.wrapped.order)

    def correct(self, model_output: Tensor, timestep: Tensor | float, channels: int) -> Tensor:
        """Return (output - bias) / (1 + k) of a step; channels beyond the sample's (a learned variance) stay.

        Parameters
        ----------
        channels : int
            Of the sample.

        Raises
        ------
        UnknownTimestepError
            If the trajectory is not the one that the correction was fitted on.
        """
        dim = self.correction.channel_dim % model_output.dim()
        extra = model_output.shape[dim] - channels
        if extra > 0:
            own, learned = model_output.split([channels, extra], dim=dim)
            return torch.cat([self.correct(own, timestep, channels), learned], dim=dim)
        grid = self._prepare(model_output)
        # On the device, so that the sampler does not wait for it.
        place = (grid - torch.as_tensor(timestep, device=grid.device)).abs().argmin()
        shape = [1] * model_output.dim()
        shape[dim] = -1
        corrected = (model_output - self._bias[place].reshape(shape)) / self._divisor[place]
        return corrected.to(model_output.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> Any:
        """Step the wrapped scheduler with the corrected prediction; arguments that it does not take are left out.

        Parameters
        ----------
        model_output : Tensor, shape (B, ...)
            What the quantized model predicts, after guidance.
        timestep : Tensor, shape (), or float
        sample : Tensor, shape as `model_output`, or with half its channels if the variance is learned
        """
        channels = sample.shape[self.correction.channel_dim]
        corrected = self.correct(model_output, timestep, channels)
        offered = {"eta": eta, "generator": generator, **options}
        passed = {name: value for name, value in offered.items() if name in self._takes}
        scaled: AbstractContextManager[object] = nullcontext()
        scales = self._scales(eta)
        if scales is not None:
            scale = scales[self._position(timestep)]
            scaled = _ScaledNoise(scale)
            if passed.get("variance_noise") is not None:
                passed["variance_noise"] = passed["variance_noise"] * scale
        with scaled:
            return self.wrapped.step(corrected, timestep, sample, **passed)

    def _prepare(self, output: Tensor) -> Tensor:
        """Make the tables of the trajectory that the wrapped scheduler is set to; returns its timesteps."""
        grid: Tensor = self.wrapped.timesteps
        if self._grid is not grid or self._bias.device != output.device:
            self._host_grid = grid.double().tolist()
            self._entries = self._match(self._host_grid)
            correction = self.correction
            self._divisor = (1 + correction.k[self._entries]).to(output.device, torch.float32)
            self._bias = correction.bias[self._entries].to(output.device, torch.float32)
            self._noise_scales = {}
            self._grid = grid
        return grid.to(output.device)

    def _match(self, wanted: list[float]) -> list[int]:
        """Return the table entry of each timestep."""
        known = torch.tensor(self.correction.timesteps, dtype=torch.float64)
        distance, entry = (torch.tensor(wanted, dtype=torch.float64)[:, None] - known).abs().min(dim=1)
        if bool((distance > _TOLERANCE).any()):
            first = wanted[int((distance > _TOLERANCE).nonzero()[0])]
            fitted = f"{len(known)} steps, {known.max():g} to {known.min():g}"
            if self.unknown_timestep is UnknownTimestep.ERROR:
                raise UnknownTimestepError(
                    f"timestep: got {first:g} of a trajectory of {len(wanted)} steps, wanted the one that the "
                    f"correction was fitted on ({fitted}); call set_timesteps({len(known)}), or sample with the "
                    f"uncorrected scheduler, {type(self.wrapped).__name__}"
                )
            warnings.warn(f"timestep {first:g} has no correction ({fitted}); using the nearest step's", stacklevel=4)
        found: list[int] = entry.tolist()
        return found

    def _position(self, timestep: Tensor | float) -> int:
        """Return where in the trajectory a timestep is; the wrapped schedulers that add noise look at it here too."""
        at = float(timestep)
        return min(range(len(self._host_grid)), key=lambda place: abs(self._host_grid[place] - at))

    def _scales(self, eta: float) -> list[float] | None:
        """Return what is left of the noise of each step of the trajectory; None if all of it is."""
        if eta not in self._noise_scales:
            variances = self.correction.variance[self._entries].tolist()
            levels = noise_levels(self.wrapped, self._host_grid, eta) if any(variances) else None
            scales = None
            if levels is not None:
                pairs = zip(levels, variances, strict=True)
                scales = [noise_scale(sigma, gain, variance) for (sigma, gain), variance in pairs]
            self._noise_scales[eta] = scales
        return self._noise_scales[eta]


def is_corrected(config: Mapping[str, Any] | None) -> bool:
    """Whether a scheduler config is of a corrected scheduler."""
    return config is not None and config.get("_class_name") == CLASS_NAME


def unwrap_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the wrapped scheduler's config, and the correction's tables.

    Raises
    ------
    QuantizationError
        If there is no correction in it.
    """
    inner = dict(config)
    name, tables = inner.pop("wrapped_class", None), inner.pop("correction", None)
    if name is None or not isinstance(tables, Mapping):
        raise QuantizationError(f"scheduler config: got none of wrapped_class and correction, wanted a {CLASS_NAME}'s")
    return inner | {"_class_name": name}, tables


class _ScaledNoise(TorchFunctionMode):
    """While active, `torch.randn` gives less: so every scheduler's own arithmetic stays as it is."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * self.scale if func is torch.randn else result


def noise_levels(scheduler: Any, timesteps: Sequence[float], eta: float) -> list[tuple[float, float]] | None:
    """Return, for each step, the standard deviation of the noise that a scheduler adds and its gain d x_p / d output.

    None for schedulers whose step is not one affine function of the prediction plus noise, and where none is added.
    """
    name = type(scheduler).__name__
    if name not in _LEVELS or (name == "DDIMScheduler" and eta == 0):
        return None
    return _LEVELS[name](scheduler, timesteps, eta)


def _ddim_levels(scheduler: Any, timesteps: Sequence[float], eta: float) -> list[tuple[float, float]]:
    """Return the standard deviation of the noise and the gain of each DDIM step."""
    levels = []
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    for timestep in map(int, timesteps):
        after = timestep - stride
        abar = float(scheduler.alphas_cumprod[timestep])
        abar_next = float(scheduler.alphas_cumprod[after] if after >= 0 else scheduler.final_alpha_cumprod)
        sigma = eta * float(scheduler._get_variance(timestep, after)) ** 0.5
        levels.append((sigma, ddim_gain(scheduler.config.prediction_type, abar, abar_next, sigma)))
    return levels


def _ddpm_levels(scheduler: Any, timesteps: Sequence[float], eta: float) -> list[tuple[float, float]]:
    """Return the same of ancestral DDPM; a variance that the network learns, or its logarithm, is left alone."""
    levels = []
    kind = scheduler.config.variance_type
    steps = list(map(int, timesteps))
    for timestep, after in zip(steps, [*steps[1:], -1], strict=True):
        abar = float(scheduler.alphas_cumprod[timestep])
        abar_next = float(scheduler.alphas_cumprod[after]) if after >= 0 else 1.0
        known = timestep > 0 and kind in ("fixed_small", "fixed_small_log", "fixed_large")
        variance = float(scheduler._get_variance(timestep)) if known else 0.0
        sigma = variance if kind == "fixed_small_log" else variance**0.5  # diffusers gives the deviation there
        levels.append((sigma, ddpm_gain(scheduler.config.prediction_type, abar, abar_next)))
    return levels


def _euler_ancestral_levels(scheduler: Any, timesteps: Sequence[float], eta: float) -> list[tuple[float, float]]:
    """Return the same of Euler-ancestral steps."""
    sigmas = scheduler.sigmas.double().tolist()
    levels = []
    for before, after in pairwise(sigmas):
        up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        levels.append((up, euler_ancestral_gain(scheduler.config.prediction_type, before, down)))
    return levels


_LEVELS = {
    "DDIMScheduler": _ddim_levels,
    "DDPMScheduler": _ddpm_levels,
    "EulerAncestralDiscreteScheduler": _euler_ancestral_levels,
}
