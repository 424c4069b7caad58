"""Read what a task's inputs name: models, packed folders, shards, states of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quant_core.artifact.folder import SCHEDULER_FILE
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.spread import spread
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.unit_state import UnitState
from quant_spec.documents import read_json, read_json_file
from workers.execution.context import TaskContext
from workers.storage.manifest import link_tree, pull_tree


def fetch_model(digest: str, context: TaskContext, name: str = "model") -> Denoiser:
    """Load a full-precision model from its tree, on the CPU; a second one needs another `name`."""
    folder = context.scratch / name
    link_tree(context.store, digest, folder)
    return load_denoiser(folder)


def place_model(denoiser: Denoiser, context: TaskContext) -> tuple[Denoiser, str | None]:
    """Spread a denoiser over several devices if the task has them; return it, and the device that it is to go to."""
    if len(context.devices) < 2:
        return denoiser, context.device
    return replace(denoiser, model=spread(denoiser.model, context.devices)), None


def fetch_packed(digest: str, context: TaskContext) -> Path:
    """Pull a packed tree, as a user would, and return its folder."""
    folder = context.scratch / "packed"
    pull_tree(context.store, digest, folder)
    return folder


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """Read the scheduler that lies in a packed folder."""
    path = folder / SCHEDULER_FILE
    return read_json_file(path) if path.is_file() else None


def local_files(digests: Sequence[str], context: TaskContext) -> list[Path]:
    """Return local files with these bytes, in order."""
    return [context.store.local_path(digest) for digest in digests]


def open_trajectories(digests: Sequence[str], context: TaskContext) -> CalibrationSet:
    """Open shards of recorded denoiser inputs, in order, as one set."""
    return CalibrationSet(local_files(digests, context))


def read_states(digests: Sequence[str], context: TaskContext) -> list[UnitState]:
    """Read the states of units, in order."""
    return [UnitState.from_bytes(context.store.get_bytes(digest)) for digest in digests]


def read_channel_scaling(digests: Sequence[str], context: TaskContext) -> ChannelScaling:
    """Read how the input channels of some units' layers are scaled; none are if there is nothing to read."""
    return ChannelScaling.from_bytes([context.store.get_bytes(digest) for digest in digests])


def read_step_bits(digest: str | None, context: TaskContext) -> list[int] | None:
    """Read the activation bits of each trajectory step, if they were chosen."""
    if digest is None:
        return None
    table: dict[str, list[int]] = read_json(context.store.get_bytes(digest), digest[:12])
    return table["bits"]
