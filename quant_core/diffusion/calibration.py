"""Calibration sets: the exact inputs of a denoiser along its sampler's trajectories, recorded in one pass.

A shard covers a range of seeds and is one safetensors file:

    x                   (S, n, *sample) float32   denoiser inputs at each recorded step; n rows, two per seed if guided
    prediction          (S, n, *sample) float32   what the denoiser gave (only where it was asked for)
    timesteps           (S,)                      as the denoiser got them, noisiest first
    step_index          (S,) int64                position of each recorded step in the sampler's trajectory
    conditioning.<key>  (n, ...)                  rows of the conditioning, the same at every step
    sample              (seeds, *sample) float32  what the sampler ended with (only where it was asked for)

Shards over consecutive seeds concatenate to the set of all of them. Tensors are read lazily through the file's memory
map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from quant_core.diffusion.conditioning import UNBATCHED, Conditioning, concatenate, take, to_device
from quant_core.diffusion.denoiser import Denoiser, call_denoiser, sample_shape
from quant_core.diffusion.sampler import (
    Step,
    make_scheduler,
    model_timestep,
    sample,
    start,
    token_count,
    trajectory_conditioning,
)
from quant_core.diffusion.tensorfile import TensorInfo, create_tensor_file
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

CONDITIONING = "conditioning."
_FLOAT = np.dtype(np.float32)
_LONG = np.dtype(np.int64)


def select_steps(total: int, wanted: int | None) -> tuple[int, ...]:
    """Return `wanted` of `total` trajectory steps, evenly spaced with both ends in; all of them if None.

    Raises
    ------
    QuantizationError
        If more are wanted than there are, or fewer than 1.
    """
    if wanted is None or wanted == total:
        return tuple(range(total))
    if not 1 <= wanted <= total:
        raise QuantizationError(f"calibration steps: got {wanted}, wanted 1 to {total}, the sampler's steps")
    if wanted == 1:
        return (total // 2,)
    return tuple(round(i * (total - 1) / (wanted - 1)) for i in range(wanted))


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """What to record of the trajectories of some seeds.

    Attributes
    ----------
    sampler : Sampler
    steps : int | None
        How many of the trajectory's steps, evenly; None records all.
    batch_size : int
        Seeds per denoiser call.
    recorded_seeds : int | None
        How many of the first seeds have their denoiser inputs recorded; None is all.
    predictions, samples : bool
        Also write the denoiser's outputs, the final samples.
    """

    sampler: Sampler
    steps: int | None = None
    batch_size: int = 16
    recorded_seeds: int | None = None
    predictions: bool = False
    samples: bool = False


def record_trajectories(
    denoiser: Denoiser, seeds: Sequence[int], spec: RecordSpec, path: Path, *, device: str | None = "cpu"
) -> None:
    """Run the sampler once over `seeds` and write what the denoiser saw to a shard at `path`.

    The same arguments give the same bytes on one type of device. Memory does not grow with the number of steps or
    seeds recorded. A `device` of None leaves the model where it is.

    Raises
    ------
    QuantizationError
        If there are no seeds, or more steps are asked for than the sampler has.
    ConditioningError
        If the model needs conditioning that is not there.
    """
    if not seeds:
        raise QuantizationError("seeds: got none, wanted at least one")
    model = denoiser.model if device is None else denoiser.model.to(device)
    sampler = spec.sampler
    scheduler = make_scheduler(sampler, denoiser.scheduler_config)
    conditioning = trajectory_conditioning(model, sampler, seeds, denoiser.conditioning)
    shape = sample_shape(model, token_count(conditioning))
    timesteps = start(make_scheduler(sampler, denoiser.scheduler_config), sampler, shape)
    chosen = select_steps(len(timesteps), spec.steps)
    recorded = len(seeds) if spec.recorded_seeds is None else min(spec.recorded_seeds, len(seeds))
    rows = recorded * sampler.calls_per_step
    recorded_timesteps = model_timestep(timesteps, sampler)[list(chosen)]
    parts: dict[str, TensorInfo] = {
        "timesteps": TensorInfo.of(recorded_timesteps),
        "step_index": TensorInfo((len(chosen),), _LONG),
        **{CONDITIONING + key: TensorInfo.of(value) for key, value in conditioning.items()},
    }
    if rows:
        parts["x"] = TensorInfo((len(chosen), rows, *shape), _FLOAT)
    if rows and spec.predictions:
        parts["prediction"] = parts["x"]
    if spec.samples:
        parts["sample"] = TensorInfo((len(seeds), *shape), _FLOAT)
    maps = create_tensor_file(path, parts, {"sampler": json.dumps(sampler.to_json(), sort_keys=True)})
    maps["timesteps"][:] = recorded_timesteps.numpy()
    maps["step_index"][:] = chosen
    for key, value in conditioning.items():
        maps[CONDITIONING + key][:] = value.numpy()
    on_step = _writer(maps, chosen, rows) if rows else None
    samples = sample(model, scheduler, sampler, seeds, conditioning, batch_size=spec.batch_size, on_step=on_step)
    if spec.samples:
        maps["sample"][:] = samples.numpy()
    for part in maps.values():
        part.flush()


def _writer(maps: Mapping[str, Any], chosen: Sequence[int], rows: int) -> Any:
    """Return the callback that writes the steps of `chosen` into the shard's memory maps."""
    places = {index: place for place, index in enumerate(chosen)}

    def write(step: Step) -> None:
        count = min(len(step.x), rows - step.row)
        if step.index not in places or count <= 0:
            return
        where = (places[step.index], slice(step.row, step.row + count))
        maps["x"][where] = step.x[:count].float().cpu().numpy()
        if "prediction" in maps:
            maps["prediction"][where] = step.prediction[:count].float().cpu().numpy()

    return write


@dataclass(frozen=True, slots=True)
class Batch:
    """Denoiser calls to replay.

    Attributes
    ----------
    x : Tensor, shape (B, *sample), dtype float32
    timestep : Tensor, shape (B,)
        As the denoiser takes it.
    step : Tensor, shape (B,), dtype int64
        Position in the set's `timesteps`.
    conditioning : mapping of str to Tensor, B rows
    """

    x: Tensor
    timestep: Tensor
    step: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.x)


class CalibrationSet:
    """Shards read as one set of S steps times `samples` rows; a *flat index* is step * samples + row.

    Parameters
    ----------
    paths : sequence of Path
        Shards in the order of their seeds.

    Raises
    ------
    QuantizationError
        If there are none, or they are not of the same trajectory.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise QuantizationError("calibration set: got no shards, wanted at least one")
        self._handles = [safe_open(path, framework="pt") for path in paths]
        first = self._handles[0]
        self.timesteps: Tensor = first.get_tensor("timesteps")
        self.step_index: Tensor = first.get_tensor("step_index")
        for path, handle in zip(paths, self._handles, strict=True):
            if not torch.equal(handle.get_tensor("timesteps"), self.timesteps):
                raise QuantizationError(
                    f"{path}: got a trajectory that differs from {paths[0]}, wanted the same timesteps"
                )
        self._x = [handle.get_slice("x") for handle in self._handles]
        self._counts = [part.get_shape()[1] for part in self._x]
        self.sample_shape: tuple[int, ...] = tuple(self._x[0].get_shape()[2:])
        pairs = zip(self._handles, self._counts, strict=True)
        self.conditioning = concatenate([read_conditioning(_small(handle), count) for handle, count in pairs])

    @property
    def steps(self) -> int:
        """Number of recorded steps."""
        return len(self.timesteps)

    @property
    def samples(self) -> int:
        """Rows per step."""
        return sum(self._counts)

    def __len__(self) -> int:
        return self.steps * self.samples

    def rows(self, step: int, first: int, stop: int) -> Batch:
        """Return rows [first, stop) of one step."""
        x = self._read(step, first, stop)
        return self._batch(x, torch.full((stop - first,), step), torch.arange(first, stop))

    def gather(self, indices: Tensor) -> Batch:
        """Return the rows at flat indices, shape (B,), dtype int64, in their order."""
        step, row = indices // self.samples, indices % self.samples
        places = zip(step.tolist(), row.tolist(), strict=True)
        return self._batch(torch.cat([self._read(s, r, r + 1) for s, r in places]), step, row)

    def predictions(self, indices: Tensor) -> Tensor:
        """Return what the denoiser gave at flat indices, shape (B, *sample); for shards that have it.

        Raises
        ------
        QuantizationError
            If they were recorded without predictions.
        """
        if "prediction" not in self._handles[0].keys():  # noqa: SIM118  (not a mapping)
            raise QuantizationError("calibration set: got shards without predictions, wanted them recorded")
        shards = [handle.get_slice("prediction") for handle in self._handles]
        places = [(int(index) // self.samples, int(index) % self.samples) for index in indices]
        return torch.cat([self._read(step, row, row + 1, shards) for step, row in places])

    def _read(self, step: int, first: int, stop: int, shards: Sequence[Any] | None = None) -> Tensor:
        """Read some rows of one step from the shards that hold them: the inputs, unless another slice is given."""
        parts, low = [], 0
        for part, count in zip(self._x if shards is None else shards, self._counts, strict=True):
            a, b = max(first - low, 0), min(stop - low, count)
            if a < b:
                parts.append(part[step, a:b])
            low += count
        return torch.cat(parts)

    def by_step(self, batch_size: int) -> Iterator[Batch]:
        """Yield all rows, step after step; no batch mixes steps."""
        for step in range(self.steps):
            for first in range(0, self.samples, batch_size):
                yield self.rows(step, first, min(first + batch_size, self.samples))

    def _batch(self, x: Tensor, step: Tensor, row: Tensor) -> Batch:
        return Batch(x, self.timesteps[step], step, take(self.conditioning, row))


def read_conditioning(shard: Mapping[str, Tensor], rows: int | None = None) -> dict[str, Tensor]:
    """Return the conditioning among a shard's tensors, its first `rows` (all if None)."""
    found = {key.removeprefix(CONDITIONING): shard[key] for key in sorted(shard) if key.startswith(CONDITIONING)}
    return {key: value if key in UNBATCHED else value[:rows] for key, value in found.items()}


def _small(handle: Any) -> dict[str, Tensor]:
    """Read a shard's conditioning, without its denoiser inputs."""
    names = [key for key in sorted(handle.keys()) if key.startswith(CONDITIONING)]
    return {key: handle.get_tensor(key) for key in names}


def replay(model: nn.Module, batch: Batch) -> Tensor:
    """Call a denoiser as it was called on the trajectory; returns its prediction, shape as `batch.x`."""
    device = next(model.parameters(), next(model.buffers(), batch.x)).device
    return call_denoiser(model, batch.x.to(device), batch.timestep.to(device), to_device(batch.conditioning, device))
