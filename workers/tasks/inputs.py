"""Read what a task's inputs name: models, packed folders, shards, states of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from quant_core.artifact.folder import SCHEDULER_FILE
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.conditioning import class_count
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.embeddings import Embeddings
from quant_core.diffusion.pipeline import load_pipeline, place_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.diffusion.spread import spread
from quant_core.diffusion.trajectories import LoopTrajectories, PipelineTrajectories, Trajectories
from quant_core.fit.channel_scaling import ChannelScaling
from quant_core.fit.unit_state import UnitState
from quant_spec.documents import read_json, read_json_file
from quant_spec.prompts import PromptLine, PromptPart, read_prompts, select_part
from quant_spec.sampler import Sampler
from workers.execution.context import TaskContext
from workers.storage.manifest import link_tree, pull_tree


def fetch_model(digest: str, context: TaskContext, name: str = "model", *, streamed: bool | None = False) -> Denoiser:
    """Load a full-precision model from its tree, on the CPU; a second one needs another `name`.

    `streamed` as for `load_denoiser`: None for tasks that only read weights.
    """
    folder = context.scratch / name
    link_tree(context.store, digest, folder)
    return load_denoiser(folder, streamed=streamed)


def place_model(denoiser: Denoiser, context: TaskContext) -> tuple[Denoiser, str | None]:
    """Spread a denoiser over several devices if the task has them; return it, and the device that it is to go to."""
    if len(context.devices) < 2:
        return denoiser, context.device
    return replace(denoiser, model=spread(denoiser.model, context.devices)), None


class Sampled(Protocol):
    """What tasks that sample read besides a model."""

    @property
    def prompts(self) -> str | None:
        """Digest of a prompts file."""

    @property
    def embeddings(self) -> str | None:
        """Digest of what its lines encode to."""


def find_trajectories(
    denoiser: Denoiser, sampler: Sampler, inputs: Sampled, part: PromptPart | None, context: TaskContext
) -> Trajectories:
    """Return what samples with a denoiser: its pipeline, if a whole one lies around it, else the sampler's loop.

    Parameters
    ----------
    denoiser
        On its device. Its model may be another than its folder's: a quantized one.
    inputs
        The task's: digests of a prompts file (None: all classes of a class-conditional model), and of what its lines
        encode to (None: the pipeline's own text encoders read them).
    part
        Which prompts of the file.
    """
    if part is None or denoiser.folder is None:
        return LoopTrajectories(denoiser.model, denoiser.scheduler_config, sampler, denoiser.conditioning)
    pipeline = load_pipeline(
        denoiser.folder,
        denoiser.model,
        make_scheduler(sampler, denoiser.scheduler_config),
        reads_text=inputs.embeddings is None,
    )
    if len(context.devices) < 2:
        place_pipeline(pipeline, context.device)
    lines = read_lines(denoiser, inputs.prompts, part, context)
    encoded = None if inputs.embeddings is None else Embeddings(context.store.local_path(inputs.embeddings))
    return PipelineTrajectories(pipeline, sampler, lines, encoded)


def read_lines(
    denoiser: Denoiser, prompts: str | None, part: PromptPart, context: TaskContext
) -> tuple[PromptLine, ...]:
    """Return what a pipeline is told: a part of a prompts file, or every class of its denoiser."""
    if prompts is not None:
        return select_part(read_prompts(context.store.get_bytes(prompts), f"prompts {prompts[:12]}"), part)
    return tuple(PromptLine(class_label=label) for label in range(class_count(denoiser.model)))


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
