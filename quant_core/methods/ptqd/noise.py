"""Measure what quantization adds to a denoiser's predictions, along full-precision trajectories and after guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quant_core.diffusion.branch import Other
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import channel_dim
from quant_core.diffusion.finite import Moment, check_prediction
from quant_core.diffusion.output import map_output
from quant_core.diffusion.sampler import guide, make_scheduler, model_timestep, start
from quant_core.diffusion.trajectories import PipelineTrajectories, stepping
from quant_core.methods.ptqd.correction import NoiseMoments, pair_sums
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler


@torch.no_grad()
def measure_noise(
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampler: Sampler,
    reference: Path,
    *,
    batch_size: int,
) -> NoiseMoments:
    """Add up the moments of a quantized model's errors on a shard of full-precision trajectories.

    Parameters
    ----------
    model : Module
        Quantized.
    scheduler_config : mapping or None
        Of the packed model.
    reference : Path
        A shard with `x` and `prediction` of every step.
    batch_size : int
        Seeds per denoiser call.

    Raises
    ------
    QuantizationError
        If the shard is of another trajectory.
    NotFiniteError
        If the model predicts NaN or infinity.
    """
    trajectory = CalibrationSet([reference])
    timesteps = start(make_scheduler(sampler, scheduler_config), sampler, trajectory.sample_shape)
    if not torch.equal(model_timestep(timesteps, sampler), trajectory.timesteps):
        raise QuantizationError(
            f"reference {reference}: got {trajectory.steps} steps, wanted the trajectory of the model's scheduler, "
            f"{len(timesteps)} steps"
        )
    dim = channel_dim(model)
    # (B, *sample): the batch comes first, so a channel dimension counted from the front is one less without it
    channels = trajectory.sample_shape[dim if dim < 0 else dim - 1]
    moments = NoiseMoments.of(timesteps.double().tolist(), channels)
    elements = 0
    with safe_open(reference, framework="pt") as handle:
        expected = handle.get_slice("prediction")
        # Trajectory by trajectory, as a sampler calls: a model may hold differences between steps.
        for first, stop in row_ranges(trajectory.samples, sampler, batch_size):
            for step in range(trajectory.steps):
                exact = guide(expected[step, first:stop], sampler)
                found = guide(_predict(model, trajectory, step, first, stop).to("cpu", torch.float32), sampler)
                moments.sums[:, step] += pair_sums(exact, found - exact, dim)
            elements += exact.numel() // channels
    return NoiseMoments(moments.timesteps, elements, moments.sums)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A scheduler's step of a full-precision trajectory: its prediction after guidance, and what it gave."""

    prediction: Tensor
    given: Any


@torch.no_grad()
def measure_pipeline_noise(
    trajectories: PipelineTrajectories, quantized: nn.Module, seeds: Sequence[int], *, batch_size: int
) -> NoiseMoments:
    """Add up the moments of a quantized model's errors along full-precision trajectories of a whole pipeline.

    Each batch goes through the pipeline twice. First in full precision; then with the quantized model, while every
    step of the scheduler gives what it gave before, so that both predict from the same latents. What is compared is
    what reaches the scheduler, so guidance is the pipeline's own.

    Parameters
    ----------
    trajectories : PipelineTrajectories
        In full precision.
    quantized : Module
        Called in place of its model.
    seeds : sequence of int
    batch_size : int
        Seeds per call.

    Raises
    ------
    QuantizationError
        If the pipeline steps its scheduler another number of times than that has timesteps.
    NotFiniteError
        If a model predicts NaN or infinity.
    """
    scheduler, timesteps = trajectories.schedule(seeds)
    dim = channel_dim(trajectories.model)
    batch_size = trajectories.together(seeds, batch_size)
    moments: NoiseMoments | None = None
    elements = 0
    for first in range(0, len(seeds), batch_size):
        batch = seeds[first : first + batch_size]
        taken: list[_Taken] = []

        def record(output: Tensor, _: Tensor, go: Callable[[], Any], taken: list[_Taken] = taken) -> Any:
            given = go()
            taken.append(_Taken(output.float().cpu(), map_output(given, lambda tensor: tensor.clone())))
            return given

        with stepping(scheduler, record):
            trajectories.run(batch, batch_size=len(batch), wants_samples=False)
        if len(taken) != len(timesteps):
            raise QuantizationError(
                f"{type(trajectories.pipeline).__name__}: got {len(taken)} steps of its scheduler for {len(timesteps)} "
                "timesteps, wanted one each, which a correction of predictions needs"
            )
        found: list[Tensor] = []

        def follow(
            output: Tensor,
            _: Tensor,
            go: Callable[[], Any],
            taken: list[_Taken] = taken,
            found: list[Tensor] = found,
        ) -> Any:
            go()  # for what the scheduler keeps from step to step
            found.append(output.float().cpu())
            return map_output(taken[len(found) - 1].given, lambda tensor: tensor.clone())

        with stepping(scheduler, follow):
            trajectories.run(batch, batch_size=len(batch), instead=Other(quantized), wants_samples=False)
        for step, (exact, other) in enumerate(zip(taken, found, strict=True)):
            # A learned variance, which some pipelines pass on, is not corrected.
            channels = _latents(exact.given).shape[dim]
            own = exact.prediction.narrow(dim, 0, channels)
            if moments is None:
                moments = NoiseMoments.of(timesteps.double().tolist(), channels)
            moments.sums[:, step] += pair_sums(own, other.narrow(dim, 0, channels) - own, dim)
        elements += taken[0].prediction.narrow(dim, 0, channels).numel() // channels
    assert moments is not None
    return NoiseMoments(moments.timesteps, elements, moments.sums)


def _latents(given: Any) -> Tensor:
    """Return the latents that a scheduler's step gave."""
    found: Tensor = given[0] if isinstance(given, tuple) else given.prev_sample
    return found


def _predict(model: nn.Module, trajectory: CalibrationSet, step: int, first: int, stop: int) -> Tensor:
    """Return a model's predictions for rows [first, stop) of a step; NotFiniteError if they are not finite."""
    batch = trajectory.rows(step, first, stop)
    prediction = replay(model, batch)
    check_prediction(Moment(step, batch.timestep[0]), prediction, model)
    return prediction


def row_ranges(rows: int, sampler: Sampler, batch_size: int) -> list[tuple[int, int]]:
    """Split rows of a trajectory into batches of seeds, which have two rows each with guidance."""
    size = batch_size * sampler.calls_per_step
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def corrected_power(model: nn.Module, scheduler: Any, sampler: Sampler, reference: Path, batch_size: int) -> Tensor:
    """Sum the power of the full-precision predictions and of what a corrected sampler makes of a model's, per step.

    As `quant_core.metrics.sqnr.error_power`, but of predictions as the sampler uses them: guided and corrected.

    Parameters
    ----------
    scheduler : QuantmillCorrectedScheduler
        With its timesteps set.

    Returns
    -------
    Tensor, shape (2, S), dtype float64
    """
    trajectory = CalibrationSet([reference])
    dim = channel_dim(model)
    sums = torch.zeros(2, trajectory.steps, dtype=torch.float64)
    with safe_open(reference, framework="pt") as handle, torch.no_grad():
        expected = handle.get_slice("prediction")
        for first, stop in row_ranges(trajectory.samples, sampler, batch_size):
            for step in range(trajectory.steps):
                exact = guide(expected[step, first:stop], sampler)
                found = guide(_predict(model, trajectory, step, first, stop), sampler)
                found = scheduler.correct(found, scheduler.timesteps[step], exact.shape[dim]).cpu()
                sums[0, step] += exact.double().square().sum()
                sums[1, step] += (found.double() - exact.double()).square().sum()
    return sums
