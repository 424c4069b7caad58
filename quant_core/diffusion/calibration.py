"""Calibration sets: the exact inputs of a denoiser along its sampler's trajectories, recorded in one pass.

A shard covers a range of seeds and is one safetensors file:

    x                   (S, n, *sample) float32   denoiser inputs at each recorded step; n rows, two per seed if guided
    prediction          (S, n, *sample) float32   what the denoiser gave (only where it was asked for)
    timesteps           (S,)                      as the denoiser got them, noisiest first
    step_index          (S,) int64                position of each recorded step in the sampler's trajectory
    conditioning.<key>  (n, ...)                  rows of the conditioning, the same at every step
    stepwise.<key>      (S, n, ...)               rows of the conditioning that are others at every step
    sample              (seeds, *sample) float32  what the sampler ended with (only where it was asked for): pixels in
                                                  [-1, 1] if a pipeline made them, which then has
    latent              (seeds, ...) float32      what its decoder was given

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

from quant_core.diffusion.conditioning import Conditioning, concatenate, is_shared, take, to_device
from quant_core.diffusion.denoiser import Denoiser, call_denoiser
from quant_core.diffusion.finite import Moment
from quant_core.diffusion.sampler import OnStep, Step
from quant_core.diffusion.tensorfile import TensorInfo, create_tensor_file
from quant_core.diffusion.trajectories import LoopTrajectories, Trajectories
from quant_core.errors import NotFiniteError
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

CONDITIONING = "conditioning."
STEPWISE = "stepwise."
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


def record_trajectories(denoiser: Denoiser, seeds: Sequence[int], spec: RecordSpec, path: Path) -> None:
    """Run the sampler once over `seeds` and write what the denoiser saw to a shard at `path`.

    The same arguments give the same bytes on one type of device. Memory does not grow with the number of steps or
    seeds recorded. The model stays on its device.

    Raises
    ------
    QuantizationError
        If there are no seeds, or more steps are asked for than the sampler has.
    ConditioningError
        If the model needs conditioning that is not there.
    """
    if not seeds:
        raise QuantizationError("seeds: got none, wanted at least one")
    loop = LoopTrajectories(denoiser.model, denoiser.scheduler_config, spec.sampler, denoiser.conditioning)
    record(loop, seeds, spec, path)


def record(trajectories: Trajectories, seeds: Sequence[int], spec: RecordSpec, path: Path) -> None:
    """Write what the denoiser saw on the trajectories of `seeds` to a shard at `path`; see `record_trajectories`."""
    script = trajectories.script(seeds, wants_samples=spec.samples)
    chosen = select_steps(len(script.timesteps), spec.steps)
    recorded = len(seeds) if spec.recorded_seeds is None else min(spec.recorded_seeds, len(seeds))
    rows = recorded * script.rows
    recorded_timesteps = script.timesteps[list(chosen)]
    parts: dict[str, TensorInfo] = {
        "timesteps": TensorInfo.of(recorded_timesteps),
        "step_index": TensorInfo((len(chosen),), _LONG),
    }
    for key, value in script.conditioning.items():
        info = TensorInfo.of(value if is_shared(key) else _row(value, script.rows))
        if key in script.stepwise:
            if rows:
                parts[STEPWISE + key] = TensorInfo((len(chosen), rows, *info.shape), info.dtype)
        elif is_shared(key):
            parts[CONDITIONING + key] = info
        else:
            parts[CONDITIONING + key] = TensorInfo((len(seeds) * script.rows, *info.shape), info.dtype)
    if rows:
        parts["x"] = TensorInfo((len(chosen), rows, *script.x), _FLOAT)
    if rows and spec.predictions:
        parts["prediction"] = TensorInfo((len(chosen), rows, *script.prediction), _FLOAT)
    if spec.samples:
        parts["sample"] = TensorInfo((len(seeds), *script.sample), _FLOAT)
    if spec.samples and script.latent is not None:
        parts["latent"] = TensorInfo((len(seeds), *script.latent), _FLOAT)
    maps = create_tensor_file(path, parts, {"sampler": json.dumps(spec.sampler.to_json(), sort_keys=True)})
    maps["timesteps"][:] = recorded_timesteps.numpy()
    maps["step_index"][:] = chosen
    on_step = _writer(maps, script.timesteps, chosen, rows)
    made = trajectories.run(seeds, batch_size=spec.batch_size, on_step=on_step, wants_samples=spec.samples)
    if spec.samples and made is not None:
        maps["sample"][:] = made.samples.numpy()
        if made.latents is not None:
            maps["latent"][:] = made.latents.numpy()
    for part in maps.values():
        part.flush()


def _row(value: Tensor, rows: int) -> Tensor:
    """Return the first row of a keyword's tensor; a number stands for one in every row."""
    return value if value.dim() == 0 else value[0]


def _writer(maps: Mapping[str, Any], timesteps: Tensor, chosen: Sequence[int], rows: int) -> OnStep:
    """Return the callback that writes the steps of `chosen` into the shard's memory maps."""
    places = {index: place for place, index in enumerate(chosen)}

    def write(step: Step) -> None:
        if float(step.timestep) != float(timesteps[step.index]):
            raise QuantizationError(
                f"trajectory: got timestep {float(step.timestep):g} at step {step.index}, wanted "
                f"{float(timesteps[step.index]):g}, as for the first seed"
            )
        if step.index == 0:
            for key, value in step.conditioning.items():
                if CONDITIONING + key in maps:
                    _check_told(key, value, maps[CONDITIONING + key], step.row)
                    where = ... if is_shared(key) else slice(step.row, step.row + len(step.x))
                    maps[CONDITIONING + key][where] = value.cpu().numpy()
        count = min(len(step.x), rows - step.row)
        if step.index not in places or count <= 0:
            return
        place = (places[step.index], slice(step.row, step.row + count))
        maps["x"][place] = step.x[:count].float().cpu().numpy()
        for key, value in step.conditioning.items():
            if STEPWISE + key in maps:
                maps[STEPWISE + key][place] = value[:count].cpu().numpy()
        if "prediction" in maps:
            maps["prediction"][place] = step.prediction[:count].float().cpu().numpy()

    return write


def _check_told(key: str, value: Tensor, written: Any, row: int) -> None:
    """Refuse what a later batch is told that does not go with what the first was told."""
    shape = tuple(value.shape) if is_shared(key) else tuple(value.shape[1:])
    wanted = tuple(written.shape) if is_shared(key) else tuple(written.shape[1:])
    if shape != wanted:
        raise QuantizationError(
            f"trajectory: got {key} of shape {shape}, wanted {wanted}, as for the first seed: prompts must be padded "
            "to one length (sampler.arguments)"
        )
    if is_shared(key) and row and not np.array_equal(value.float().cpu().numpy(), written.astype(np.float32)):
        raise QuantizationError(f"trajectory: got another {key} than for the first seed, wanted the same for all")


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

    Notes
    -----
    Reading rows raises NotFiniteError where they hold NaN or infinity: before trajectories were checked as they are
    recorded, shards of such were stored, and results that are stored are not computed again.
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
        stepwise = [key for key in sorted(first.keys()) if key.startswith(STEPWISE)]
        self._stepwise = {
            key.removeprefix(STEPWISE): [handle.get_slice(key) for handle in self._handles] for key in stepwise
        }
        pairs = zip(self._handles, self._counts, strict=True)
        self.conditioning = concatenate([read_conditioning(_small(handle), count) for handle, count in pairs])

    @property
    def steps(self) -> int:
        """Number of recorded steps."""
        return len(self.timesteps)

    @property
    def first_alike(self) -> list[int]:
        """For each step, the first one at the same timestep: pipelines and samplers may call twice at one."""
        timesteps = self.timesteps.tolist()
        return [timesteps.index(timestep) for timestep in timesteps]

    @property
    def samples(self) -> int:
        """Rows per step."""
        return sum(self._counts)

    def __len__(self) -> int:
        return self.steps * self.samples

    def rows(self, step: int, first: int, stop: int) -> Batch:
        """Return rows [first, stop) of one step."""
        x, steps = self._read(step, first, stop), torch.full((stop - first,), step)
        return self._batch(self._finite(x, steps), steps, torch.arange(first, stop))

    def gather(self, indices: Tensor) -> Batch:
        """Return the rows at flat indices, shape (B,), dtype int64, in their order."""
        step, row = indices // self.samples, indices % self.samples
        places = zip(step.tolist(), row.tolist(), strict=True)
        x = torch.cat([self._read(s, r, r + 1) for s, r in places])
        return self._batch(self._finite(x, step), step, row)

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
        found = torch.cat([self._read(step, row, row + 1, shards) for step, row in places])
        return self._finite(found, indices // self.samples)

    def _finite(self, values: Tensor, step: Tensor) -> Tensor:
        """Return rows, shape (B, *sample), of steps, shape (B,); NotFiniteError names the first that is not finite."""
        if bool(torch.isfinite(values).all()):
            return values
        bad = step[~torch.isfinite(values).flatten(1).all(1)].min()
        moment = Moment(int(self.step_index[bad]), self.timesteps[bad])
        raise NotFiniteError(
            f"calibration: got NaN or infinity at {moment}, wanted finite trajectories: a sampler.scheduler and "
            "sampler.options that fit how the model was trained"
        )

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

    def by_trajectory(self, batch_size: int) -> Iterator[Batch]:
        """Yield all rows, a batch of trajectories after another, each from its first step to its last."""
        for first in range(0, self.samples, batch_size):
            for step in range(self.steps):
                yield self.rows(step, first, min(first + batch_size, self.samples))

    def _batch(self, x: Tensor, step: Tensor, row: Tensor) -> Batch:
        told = take(self.conditioning, row)
        places = list(zip(step.tolist(), row.tolist(), strict=True)) if self._stepwise else []
        for key, shards in self._stepwise.items():
            told[key] = torch.cat([self._read(s, r, r + 1, shards) for s, r in places])
        return Batch(x, self.timesteps[step], step, told)


def read_conditioning(shard: Mapping[str, Tensor], rows: int | None = None) -> dict[str, Tensor]:
    """Return the conditioning among a shard's tensors, its first `rows` (all if None)."""
    found = {key.removeprefix(CONDITIONING): shard[key] for key in sorted(shard) if key.startswith(CONDITIONING)}
    return {key: value if is_shared(key) else value[:rows] for key, value in found.items()}


def _small(handle: Any) -> dict[str, Tensor]:
    """Read a shard's conditioning, without its denoiser inputs."""
    names = [key for key in sorted(handle.keys()) if key.startswith(CONDITIONING)]
    return {key: handle.get_tensor(key) for key in names}


def replay(model: nn.Module, batch: Batch) -> Tensor:
    """Call a denoiser as it was called on the trajectory; returns its prediction, shape as `batch.x`."""
    device = next(model.parameters(), next(model.buffers(), batch.x)).device
    return call_denoiser(model, batch.x.to(device), batch.timestep.to(device), to_device(batch.conditioning, device))
