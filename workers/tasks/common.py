"""What several task bodies do first: fetch a model or shards, count seeds."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quant_core.artifact.folder import SCHEDULER_FILE
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from workers.errors import TaskError
from workers.execution.context import Inputs, TaskContext
from workers.storage.manifest import link_tree, pull_tree


def only(inputs: Inputs, name: str) -> str:
    """Return the one digest of an input.

    Raises
    ------
    TaskError
        If there is none or more than one.
    """
    digests = inputs.get(name, [])
    if len(digests) != 1:
        raise TaskError(f"input {name}: got {len(digests)} digests, wanted 1")
    return digests[0]


def fetch_model(inputs: Inputs, context: TaskContext, name: str = "model") -> Denoiser:
    """Load the full-precision model of the input `model`, on the CPU; once more under another `name`."""
    folder = context.scratch / name
    link_tree(context.store, only(inputs, "model"), folder)
    return load_denoiser(folder)


def fetch_packed(inputs: Inputs, context: TaskContext) -> Path:
    """Pull the tree of the input `packed`, as a user would, and return its folder."""
    folder = context.scratch / "packed"
    pull_tree(context.store, only(inputs, "packed"), folder)
    return folder


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """Read the scheduler that lies in a packed folder."""
    path = folder / SCHEDULER_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def chosen_step_bits(inputs: Inputs, context: TaskContext) -> list[int] | None:
    """Return the bits of each trajectory step, if they were chosen."""
    if "step_bits" not in inputs:
        return None
    table: dict[str, list[int]] = json.loads(context.store.get_bytes(only(inputs, "step_bits")))
    return table["bits"]


def local_files(digests: Sequence[str], context: TaskContext) -> list[Path]:
    """Return local files with these bytes, in order."""
    return [context.store.local_path(digest) for digest in digests]


def seed_range(seeds: Mapping[str, int]) -> range:
    """Return the seeds of a shard, {"first", "count"}."""
    return range(seeds["first"], seeds["first"] + seeds["count"])


def to_json(value: Any) -> bytes:
    """Return the one serialised form of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def device_name(device: torch.device) -> str:
    """Return what a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
