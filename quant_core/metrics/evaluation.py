"""Compare a quantized model with the full-precision reference samples of the same seeds, and sum up shards of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, read_conditioning
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusion.sampler import Step, make_scheduler, model_timestep, sample, start
from quant_core.diffusion.trajectories import Trajectories
from quant_core.methods.ptqd.noise import corrected_power
from quant_core.metrics.frechet import (
    KERNEL_SAMPLES,
    ResizedFeatures,
    frechet_distance,
    kernel_distance,
    sample_features,
)
from quant_core.metrics.images import signal_maps, to_rgb
from quant_core.metrics.psnr import mean_with_ci, psnr_of_mean_error, psnr_per_sample
from quant_core.metrics.sqnr import error_power, sqnr_db, sqnr_per_sample
from quant_core.metrics.ssim import ssim_per_sample
from quant_spec.enums import SampleSpace
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

_DECIMALS = 6  # beyond this, the figures are noise of the summation order


def evaluate_shard(
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampler: Sampler,
    seeds: Sequence[int],
    reference: Path,
    path: Path,
    *,
    batch_size: int,
    space: SampleSpace,
) -> None:
    """Sample the seeds of a reference shard with a quantized model and write what came out to `path`.

    The file holds `sample` (n, ...) float32, `psnr_db` (n,) float64 and, where the reference has a trajectory, `power`
    (2, S) float64: per step, the sums of |eps|^2 and of |eps_hat - eps|^2 on the full-precision inputs; with a
    corrected scheduler, of the predictions after guidance and correction.

    Raises
    ------
    QuantizationError
        If the reference is of other seeds, or of another trajectory.
    """
    expected = _read(reference)
    if len(expected["sample"]) != len(seeds):
        raise QuantizationError(f"reference: got samples of {len(expected['sample'])} seeds, wanted {len(seeds)}")
    scheduler = make_scheduler(sampler, scheduler_config)
    shape = tuple(expected["sample"].shape[1:])
    timesteps = model_timestep(start(make_scheduler(sampler, scheduler_config), sampler, shape), sampler)
    if not torch.equal(timesteps, expected["timesteps"]):
        raise QuantizationError(
            f"reference: got timesteps {_ends(expected['timesteps'])}, wanted those of the packed model's scheduler, "
            f"{_ends(timesteps)}"
        )
    samples = sample(model, scheduler, sampler, seeds, read_conditioning(expected), batch_size=batch_size)
    results = {"sample": samples, "psnr_db": psnr_per_sample(expected["sample"], samples, space)}
    with safe_open(reference, framework="pt") as handle:
        if "x" in handle.keys():  # noqa: SIM118 - not a mapping
            results["power"] = _power(model, scheduler, sampler, reference, handle, batch_size)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, path)


def evaluate_pipeline(
    trajectories: Trajectories, model: nn.Module, seeds: Sequence[int], reference: Path, path: Path, *, batch_size: int
) -> None:
    """Sample the seeds of a reference shard with a pipeline whose denoiser is quantized; write what came out to `path`.

    The file is as from `evaluate_shard`, the samples are pixels; besides it has, where they were decoded, `latent`, and
    `latent_sqnr_db` (n,) float64, which compares them with the reference's.

    Raises
    ------
    QuantizationError
        If the reference is of other seeds, or the pipeline calls its denoiser at other timesteps.
    """
    expected = _read(reference)
    if len(expected["sample"]) != len(seeds):
        raise QuantizationError(f"reference: got samples of {len(expected['sample'])} seeds, wanted {len(seeds)}")
    timesteps = expected["timesteps"]

    def check(step: Step) -> None:
        if step.index >= len(timesteps) or float(step.timestep) != float(timesteps[step.index]):
            raise QuantizationError(
                f"reference: got timesteps {_ends(timesteps)}, wanted {float(step.timestep):g} at step {step.index}, "
                "as the packed model's pipeline has"
            )

    made = trajectories.run(seeds, batch_size=batch_size, on_step=check)
    assert made is not None
    results = {
        "sample": made.samples,
        "psnr_db": psnr_per_sample(expected["sample"], made.samples, SampleSpace.PIXELS),
        "ssim": ssim_per_sample(expected["sample"], made.samples),
    }
    if made.latents is not None and "latent" in expected:
        results |= {"latent": made.latents, "latent_sqnr_db": sqnr_per_sample(expected["latent"], made.latents)}
    with safe_open(reference, framework="pt") as handle:
        if "x" in handle.keys():  # noqa: SIM118 - not a mapping
            trajectory = CalibrationSet([reference])
            rows = batch_size * max(1, trajectory.samples // len(seeds))
            results["power"] = error_power(model, trajectory, handle.get_slice("prediction"), rows)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, path)


def _power(model: nn.Module, scheduler: Any, sampler: Sampler, reference: Path, handle: Any, batch_size: int) -> Tensor:
    """Sum the powers of prediction and error at each step: of the denoiser, or of what a correction makes of it."""
    trajectory = CalibrationSet([reference])
    if isinstance(scheduler, QuantmillCorrectedScheduler):
        start(scheduler, sampler, trajectory.sample_shape)
        return corrected_power(model, scheduler, sampler, reference, batch_size)
    rows = batch_size * sampler.calls_per_step
    return error_power(model, trajectory, handle.get_slice("prediction"), rows)


def _read(shard: Path) -> dict[str, Tensor]:
    """Read a shard without its trajectories, which may be large."""
    with safe_open(shard, framework="pt") as handle:
        names = [name for name in handle.keys() if name not in ("x", "prediction")]  # noqa: SIM118 - not a mapping
        return {name: handle.get_tensor(name) for name in names}


def _ends(timesteps: Tensor) -> str:
    return f"{float(timesteps[0]):g} to {float(timesteps[-1]):g} in {len(timesteps)} steps"


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures over all shards; samples of both models as RGB images (n, 3, H, W) in [-1, 1], and their PSNR in dB."""

    metrics: dict[str, Any]
    reference_rgb: Tensor
    quantized_rgb: Tensor
    psnr_db: tuple[float, ...]

    def shown(self, places: Sequence[int]) -> Quality:
        """Return it with some samples alone, by their places among the seeds."""
        at = list(places)
        psnr = tuple(self.psnr_db[place] for place in at)
        return Quality(self.metrics, self.reference_rgb[at], self.quantized_rgb[at], psnr)

    def worst(self, count: int) -> list[int]:
        """Return the places of the samples that are farthest from full precision's, worst first."""
        return sorted(range(len(self.psnr_db)), key=lambda place: (self.psnr_db[place], place))[:count]


def summarize(
    references: Sequence[Path],
    evaluations: Sequence[Path],
    extractor: ResizedFeatures,
    space: SampleSpace,
    *,
    are_signals: bool = False,
    device: str = "cpu",
) -> Quality:
    """Join shards into the figures of a release.

    Parameters
    ----------
    references, evaluations : sequences of Path
        Shards of the same seeds, in the same order.
    space : SampleSpace
        Whether samples are pixels.
    are_signals : bool
        Samples are (C, L), which the extractor and people look at as `signal_maps`.
    device : str
        Where the extractor runs, which is most of the work.

    Returns
    -------
    Quality
        `metrics` holds psnr_db, psnr_db_ci95, psnr_db_of_mean, n, fd, fd_extractor, kid and kid_full_precision (of
        `KERNEL_SAMPLES` and more), sqnr_db_per_step, timesteps and
        samples ("pixels", clamped to [-1, 1] before they were compared, or "latents", as they are).
    """
    expected, measured = [_read(path) for path in references], [_read(path) for path in evaluations]
    truth = torch.cat([shard["sample"] for shard in expected])
    samples = torch.cat([shard["sample"] for shard in measured])
    if are_signals:
        truth, samples = signal_maps(truth), signal_maps(samples)
    reference_rgb, quantized_rgb = to_rgb(truth, truth, space), to_rgb(samples, truth, space)
    decibels = torch.cat([shard["psnr_db"] for shard in measured]).tolist()
    psnr = mean_with_ci(decibels)
    features = [sample_features(images, extractor, device=device) for images in (reference_rgb, quantized_rgb)]
    kernel = {}
    if psnr.n >= KERNEL_SAMPLES:
        pairs = {"kid": features, "kid_full_precision": features[:1] * 2}
        kernel = {name: round(kernel_distance(*pair), 2 * _DECIMALS) for name, pair in pairs.items()}
    powers = [shard["power"] for shard in measured if "power" in shard]
    power = torch.stack(powers).sum(0).tolist() if powers else [[], []]
    metrics = {
        "psnr_db": round(psnr.value, _DECIMALS),
        "psnr_db_ci95": round(psnr.ci95, _DECIMALS),
        "psnr_db_of_mean": round(psnr_of_mean_error(decibels), _DECIMALS),
        "n": psnr.n,
        "fd": round(frechet_distance(*features), _DECIMALS),
        **kernel,
        "fd_extractor": extractor.name,
        "sqnr_db_per_step": [round(value, _DECIMALS) for value in sqnr_db(*power)],
        "timesteps": expected[0]["timesteps"].tolist(),
        "samples": str(space),
    }
    return Quality(metrics | _pipeline_metrics(measured), reference_rgb, quantized_rgb, tuple(decibels))


def _pipeline_metrics(measured: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Return what is measured of a whole pipeline besides: structural similarity, and latents before decoding."""
    found: dict[str, Any] = {}
    if all("ssim" in shard for shard in measured):
        values = torch.cat([shard["ssim"] for shard in measured])
        if bool(torch.isfinite(values).all()):
            ssim = mean_with_ci(values.tolist())
            found |= {"ssim": round(ssim.value, _DECIMALS), "ssim_ci95": round(ssim.ci95, _DECIMALS)}
    if all("latent_sqnr_db" in shard for shard in measured):
        sqnr = mean_with_ci(torch.cat([shard["latent_sqnr_db"] for shard in measured]).tolist())
        found["latent_sqnr_db"] = round(sqnr.value, _DECIMALS)
    return found
