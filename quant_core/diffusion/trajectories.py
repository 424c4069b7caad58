"""Trajectories: what a sampler does from noise to samples, shown denoiser call by denoiser call.

Two things give them: the loop of `quant_core.diffusion.sampler` around a bare denoiser, and the `__call__` of a whole
pipeline, watched at its denoiser. Calibration, references and evaluation ask for trajectories and know no more.

A pipeline is *rehearsed* first, for one seed and with a denoiser that computes once and then says zero, to learn at
which timesteps it calls, with what, and how many rows each seed has; and until its first call for two samples, to learn
what has a row for each of them, and what is the same for all (tables of positions). Rows of guided calls are recorded
seed by seed, in the order in which the pipeline has them (all seeds' first rows, then all seeds' second rows).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from quant_core.diffusion.conditioning import is_shared
from quant_core.diffusion.denoiser import PLAIN, SHARED, forward_signature, sample_shape
from quant_core.diffusion.embeddings import Embeddings, given
from quant_core.diffusion.finite import Moment, check_prediction
from quant_core.diffusion.output import map_output, prediction_of
from quant_core.diffusion.own_noise import seeded
from quant_core.diffusion.pipeline import call_arguments, call_pipeline, decoder_of, denoiser_of, flatten
from quant_core.diffusion.sampler import (
    Ask,
    Instead,
    OnStep,
    Step,
    make_scheduler,
    model_timestep,
    sample,
    start,
    token_count,
    trajectory_conditioning,
)
from quant_core.errors import DenoiserError
from quant_spec.prompts import PromptLine, line_of, seed_of
from quant_spec.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Script:
    """What all trajectories of a sampler have in common.

    Attributes
    ----------
    timesteps : Tensor, shape (S,)
        As the denoiser gets them, in the order of its calls; float32 stands for narrower floats.
    rows : int
        Of the denoiser's input for each seed.
    x, prediction : tuple of int
        Shape of one row.
    conditioning : mapping of str to Tensor
        What a single seed's call is told besides; all of it for keys that `is_shared`, else `rows` rows.
    stepwise : frozenset of str
        Keys of `conditioning` whose values are not the same at every step.
    sample, latent : tuple of int
        Shape of one sample, and of what it is decoded from; only told where samples are wanted.
    """

    timesteps: Tensor
    rows: int
    x: tuple[int, ...]
    prediction: tuple[int, ...]
    conditioning: Mapping[str, Tensor]
    stepwise: frozenset[str] = frozenset()
    sample: tuple[int, ...] = ()
    latent: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """What trajectories end with: `samples` (n, ...) float32, pixels in [-1, 1] where the pipeline makes any.

    `latents` (n, ...) are what the pipeline's decoder was given, None where nothing is decoded.
    """

    samples: Tensor
    latents: Tensor | None = None


class Trajectories(Protocol):
    """Runs a sampler from seeds to samples, with the denoiser `model`."""

    model: nn.Module

    def script(self, seeds: Sequence[int], *, wants_samples: bool = False) -> Script:
        """Return what will be seen of these seeds' trajectories."""

    def schedule(self, seeds: Sequence[int]) -> tuple[Any, Tensor]:
        """Return a scheduler that has been started for these seeds' trajectories, and its timesteps, shape (S,)."""

    def run(
        self,
        seeds: Sequence[int],
        *,
        batch_size: int,
        on_step: OnStep | None = None,
        instead: Instead | None = None,
        wants_samples: bool = True,
    ) -> Samples | None:
        """Draw one sample for each seed; None if samples are not wanted, and cost something of their own."""


class LoopTrajectories:
    """Trajectories of a bare denoiser, by the sampler's loop.

    Parameters
    ----------
    conditioning_file : Path | None
        As for `draw_conditioning`.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler_config: Mapping[str, Any] | None,
        sampler: Sampler,
        conditioning_file: Path | None,
    ) -> None:
        self.model, self.sampler = model, sampler
        self.scheduler_config, self.conditioning_file = scheduler_config, conditioning_file

    def script(self, seeds: Sequence[int], *, wants_samples: bool = False) -> Script:
        """Return what will be seen."""
        conditioning = trajectory_conditioning(self.model, self.sampler, seeds[:1], self.conditioning_file)
        shape = sample_shape(self.model, token_count(conditioning))
        timesteps = start(make_scheduler(self.sampler, self.scheduler_config), self.sampler, shape)
        rows = self.sampler.calls_per_step
        return Script(model_timestep(timesteps, self.sampler), rows, shape, shape, conditioning, sample=shape)

    def schedule(self, seeds: Sequence[int]) -> tuple[Any, Tensor]:
        """Return the scheduler, started, and its timesteps."""
        conditioning = trajectory_conditioning(self.model, self.sampler, seeds[:1], self.conditioning_file)
        scheduler = make_scheduler(self.sampler, self.scheduler_config)
        return scheduler, start(scheduler, self.sampler, sample_shape(self.model, token_count(conditioning)))

    def run(
        self,
        seeds: Sequence[int],
        *,
        batch_size: int,
        on_step: OnStep | None = None,
        instead: Instead | None = None,
        wants_samples: bool = True,
    ) -> Samples:
        """Draw the samples."""
        conditioning = trajectory_conditioning(self.model, self.sampler, seeds, self.conditioning_file)
        scheduler = make_scheduler(self.sampler, self.scheduler_config)
        samples = sample(
            self.model,
            scheduler,
            self.sampler,
            seeds,
            conditioning,
            batch_size=batch_size,
            on_step=on_step,
            instead=instead,
        )
        return Samples(samples)


class PipelineTrajectories:
    """Trajectories of a whole pipeline, by its own `__call__`.

    Parameters
    ----------
    pipeline
        As from `load_pipeline`.
    lines : sequence of PromptLine
        Seed s is told line s mod n.
    embeddings : Embeddings, optional
        What the lines encode to, for a pipeline without text encoders.
    """

    def __init__(
        self, pipeline: Any, sampler: Sampler, lines: Sequence[PromptLine], embeddings: Embeddings | None = None
    ) -> None:
        if not lines:
            raise DenoiserError("prompts: got none, wanted at least one")
        self.pipeline, self.sampler, self.lines = pipeline, sampler, tuple(lines)
        self.model, self.embeddings = denoiser_of(pipeline), embeddings
        self._shared: frozenset[str] | None = None
        self._draws: bool | None = None

    def script(self, seeds: Sequence[int], *, wants_samples: bool = False) -> Script:
        """Rehearse one seed, with one call of the denoiser."""
        seen: list[_Call] = []
        first: list[Any] = []

        def act(call: _Call, ask: Ask) -> Any:
            seen.append(call)
            if not first:
                first.append(ask())
            else:
                first[:1] = [map_output(first[0], torch.zeros_like)]
            return first[0]

        made = self._call(seeds[:1], act, wants_samples=wants_samples)
        self._draws = bool(self._draws)
        if not seen:
            raise DenoiserError(
                f"{type(self.pipeline).__name__}: got no call of its {type(self.model).__name__}, wanted one a step"
            )
        rows = len(seen[0].x)
        prediction = prediction_of(first[0], seen[0].x)
        told = seen[0].conditioning
        changing = {key for call in seen[1:] for key in told if not _equal(call.conditioning.get(key), told[key])}
        shared = self._find_shared(seeds[0])
        told, changing = _named(told, shared), {shared_name(key, shared) for key in changing}
        if wrong := sorted(key for key in changing if is_shared(key)):
            raise DenoiserError(
                f"{type(self.pipeline).__name__}: got {', '.join(wrong)} for its {type(self.model).__name__}, which "
                "change from step to step and are not a row for each sample, wanted rows, or the same at every step"
            )
        if any(
            call.conditioning.keys() != seen[0].conditioning.keys() or call.x.shape != seen[0].x.shape for call in seen
        ):
            raise DenoiserError(
                f"{type(self.pipeline).__name__}: got calls of its {type(self.model).__name__} that differ in what "
                "they are told, wanted the same keywords and shapes at every step"
            )
        return Script(
            torch.stack([call.timestep for call in seen]),
            rows,
            tuple(seen[0].x.shape[1:]),
            tuple(prediction.shape[1:]),
            told,
            frozenset(changing),
            () if made is None else tuple(made.samples.shape[1:]),
            None if made is None or made.latents is None else tuple(made.latents.shape[1:]),
        )

    def schedule(self, seeds: Sequence[int]) -> tuple[Any, Tensor]:
        """Return the pipeline's scheduler as its call sets it, and its timesteps."""
        calls = len(self.script(seeds[:1]).timesteps)
        scheduler = self.pipeline.scheduler
        if len(scheduler.timesteps) != calls:
            raise DenoiserError(
                f"{type(self.pipeline).__name__}: got {calls} calls of its {type(self.model).__name__} for "
                f"{len(scheduler.timesteps)} timesteps, wanted one each"
            )
        return scheduler, scheduler.timesteps

    def run(
        self,
        seeds: Sequence[int],
        *,
        batch_size: int,
        on_step: OnStep | None = None,
        instead: Instead | None = None,
        wants_samples: bool = True,
    ) -> Samples | None:
        """Call the pipeline, a batch of seeds at a time, as far as `together` allows."""
        batch_size = self.together(seeds, batch_size)
        parts = []
        row = 0
        for first in range(0, len(seeds), batch_size):
            batch = seeds[first : first + batch_size]
            shared = frozenset() if on_step is None else self._find_shared(seeds[0])
            watch = _Watch(self.model, len(batch), row, on_step, instead, shared)
            parts.append(self._call(batch, watch, wants_samples=wants_samples))
            row += watch.rows
        made = [part for part in parts if part is not None]
        if not made:
            return None
        latents = [part.latents for part in made if part.latents is not None]
        return Samples(torch.cat([part.samples for part in made]), torch.cat(latents) if latents else None)

    def together(self, seeds: Sequence[int], batch_size: int) -> int:
        """Return how many seeds a call may have: one, where the pipeline draws noise from the global generator."""
        if min(len(seeds), batch_size) > 1 and self._draws is None:
            self.script(seeds[:1])
        return 1 if self._draws else batch_size

    def _find_shared(self, seed: int) -> frozenset[str]:
        """Return which tensors that the denoiser is told have no row for each sample, as one and two samples show."""
        if self._shared is None:
            one, two = (self._first_call([seed] * count) for count in (1, 2))
            shared = set()
            for key, value in one.conditioning.items():
                other = two.conditioning.get(key)
                if value.dim() == 0 or is_shared(key) or other is None:
                    continue
                if len(value) == len(one.x) and len(other) == len(two.x):
                    continue
                if value.shape != other.shape:
                    raise DenoiserError(
                        f"{type(self.model).__name__}: got {key} {tuple(value.shape)} for one sample and "
                        f"{tuple(other.shape)} for two, wanted a row for each sample, or the same for all"
                    )
                shared.add(key)
            self._shared = frozenset(shared)
        return self._shared

    def _first_call(self, seeds: Sequence[int]) -> _Call:
        """Return what the denoiser is first called with for some seeds."""
        seen: list[_Call] = []

        def act(call: _Call, compute: Callable[[], Any]) -> Any:
            seen.append(call)
            raise _EnoughError

        self._call(seeds, act, wants_samples=False)
        return seen[0]

    @torch.no_grad()
    def _call(self, seeds: Sequence[int], act: Act, *, wants_samples: bool) -> Samples | None:
        lines = [line_of(self.lines, seed) for seed in seeds]
        own = [seed_of(line, seed) for seed, line in zip(seeds, lines, strict=True)]
        arguments = call_arguments(self.pipeline, self.sampler, lines, own)
        kept: list[Tensor] = []
        places = [seed % len(self.lines) for seed in seeds]
        try:
            with (
                self._seeded(own[0]),
                given(self.pipeline, self.embeddings, places),
                watched(self.model, act),
                _decoding(decoder_of(self.pipeline), kept, wants_samples),
            ):
                output = call_pipeline(self.pipeline, arguments)
        except _EnoughError:
            return None
        if not wants_samples:
            return None
        return Samples(_pixels(output), torch.cat(kept).float().cpu() if kept else None)

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        """Let what the pipeline draws from the global generator be a seed's, and see whether it does."""
        with seeded(seed, self.pipeline._execution_device) as drew:
            try:
                yield
            finally:
                if drew():
                    self._draws = True


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a denoiser: its input, the timestep (shape ()), and everything else that it is told, flat."""

    x: Tensor
    timestep: Tensor
    conditioning: Mapping[str, Tensor]


#: Is given a call and what computes it; returns the denoiser's output.
Act = Callable[[_Call, Ask], Any]


@contextmanager
def watched(model: nn.Module, act: Act) -> Iterator[None]:
    """Let `act` stand between a denoiser and whoever calls it."""
    forward = model.forward
    had = model.__dict__.get("forward")
    signature, names = inspect.signature(forward), forward_signature(model)

    @functools.wraps(forward)
    def seen(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        x, timestep = given.pop(names.sample), given.pop(names.timestep)
        given.pop("return_dict", None)
        steps = torch.as_tensor(timestep).detach().reshape(-1)[0].cpu()
        steps = steps.float() if steps.dtype in (torch.float16, torch.bfloat16) else steps
        defaults = {name: each.default for name, each in signature.parameters.items()}
        told = flatten({key: value for key, value in given.items() if value is not defaults[key]})
        if not isinstance(x, Tensor):
            raise DenoiserError(
                f"{type(model).__name__}: got {names.sample} as a {type(x).__name__}, wanted a tensor of all samples"
            )
        told = dict(_replayable(model, key, value) for key, value in told.items())

        def ask(other: nn.Module | None = None) -> Any:
            return forward(*args, **kwargs) if other is None else other(*args, **kwargs)

        return act(_Call(x, steps, told), ask)

    model.forward = seen
    try:
        yield
    finally:
        if had is None:
            del model.forward
        else:
            model.forward = had


#: Is given what a scheduler's step is: the prediction after guidance, the timestep, and what takes the step.
Move = Callable[[Tensor, Tensor, Callable[[], Any]], Any]


@contextmanager
def stepping(scheduler: Any, move: Move) -> Iterator[None]:
    """Let `move` stand between a scheduler and whoever steps it; it returns what the step is to give."""
    step = scheduler.step
    had = scheduler.__dict__.get("step")

    @functools.wraps(step)
    def seen(model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return move(model_output, torch.as_tensor(timestep), lambda: step(model_output, timestep, *args, **kwargs))

    scheduler.step = seen
    try:
        yield
    finally:
        if had is None:
            del scheduler.step
        else:
            scheduler.step = had


def _replayable(model: nn.Module, key: str, value: Any) -> tuple[str, Tensor]:
    """Return a keyword's value as a tensor; numbers have the key `PLAIN`.

    Raises
    ------
    DenoiserError
        If it is neither.
    """
    if isinstance(value, Tensor):
        return key, value
    if isinstance(value, bool | int | float):
        return PLAIN + key, torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    raise DenoiserError(
        f"{type(model).__name__}: got {key} {str(value)[:40]} ({type(value).__name__}), wanted tensors and numbers: "
        "nothing else that a pipeline tells its denoiser can be replayed"
    )


def shared_name(key: str, shared: frozenset[str]) -> str:
    """Return the key of a conditioning for a keyword, some of which are the same for all samples."""
    return SHARED + key if key in shared else key


def _named(told: Mapping[str, Tensor], shared: frozenset[str]) -> dict[str, Tensor]:
    return {shared_name(key, shared): value for key, value in told.items()}


class _Watch:
    """Passes every call of a batch on to the denoiser, and shows it to a callback with its rows seed by seed."""

    def __init__(
        self,
        model: nn.Module,
        seeds: int,
        row: int,
        on_step: OnStep | None,
        instead: Instead | None,
        shared: frozenset[str],
    ) -> None:
        self.model, self.seeds, self.row = model, seeds, row
        self.on_step, self.instead, self.shared = on_step, instead, shared
        self.index, self.rows = 0, seeds

    def __call__(self, call: _Call, ask: Ask) -> Any:
        output = ask() if self.instead is None else self.instead(self.index, self.row, call.x, ask)
        prediction = prediction_of(output, call.x)
        check_prediction(Moment(self.index, call.timestep), prediction, self.model)
        self.rows = len(call.x)
        if self.rows % self.seeds:
            raise DenoiserError(
                f"{type(self.model).__name__}: got {self.rows} rows for {self.seeds} seeds, wanted a multiple of them"
            )
        if self.on_step is not None:
            told = {
                key: value if is_shared(key) else self._by_seed(_rows(value, self.rows, key))
                for key, value in _named(call.conditioning, self.shared).items()
            }
            x, prediction = self._by_seed(call.x), self._by_seed(prediction)
            self.on_step(Step(self.index, call.timestep, self.row, x, told, prediction))
        self.index += 1
        return output

    def _by_seed(self, value: Tensor) -> Tensor:
        """Reorder rows from (all seeds' first, all seeds' second, ...) to seed by seed."""
        per_seed = len(value) // self.seeds
        if per_seed == 1:
            return value
        return value.unflatten(0, (per_seed, self.seeds)).transpose(0, 1).flatten(0, 1)


def _rows(value: Tensor, rows: int, key: str) -> Tensor:
    """Return a keyword's tensor if it has a row for each of the input."""
    if value.dim() == 0:
        return value.expand(rows)
    if len(value) != rows:
        raise DenoiserError(f"{key}: got shape {tuple(value.shape)}, wanted {rows} rows, as the denoiser's input has")
    return value


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)


class _EnoughError(Exception):
    """Leaves a pipeline's call where its denoiser is done and samples are not wanted."""


@contextmanager
def _decoding(decoder: nn.Module | None, kept: list[Tensor], wants_samples: bool) -> Iterator[None]:
    """Keep what a decoder is given; or leave the pipeline's call there."""
    if decoder is None:
        yield
        return
    decode: Any = decoder.decode
    had = decoder.__dict__.get("decode")

    @functools.wraps(decode)
    def seen(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not wants_samples:
            raise _EnoughError
        kept.append(z.detach())
        return decode(z, *args, **kwargs)

    decoder.decode = seen  # type: ignore[assignment]
    try:
        yield
    finally:
        if had is None:
            del decoder.decode
        else:
            decoder.decode = had


def _pixels(output: Any) -> Tensor:
    """Return a pipeline's images, (n, H, W, C) in [0, 1], as (n, C, H, W) float32 in [-1, 1].

    A video, (n, frames, H, W, C), is an image of its frames, one below the other.
    """
    images = output[0] if isinstance(output, tuple | list) else output
    array = np.asarray(images)
    if array.ndim == 5:
        array = array.reshape(len(array), -1, *array.shape[3:])
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise DenoiserError(
            f"pipeline: got samples of shape {array.shape}, wanted images (n, H, W, 3) or videos (n, frames, H, W, 3)"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2).contiguous() * 2 - 1
