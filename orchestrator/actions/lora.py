"""Models with LoRA files fused: what a user asks for, and the model of its own that it becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.actions.local import run_task
from orchestrator.actions.registration import FUSED_FROM, LORAS
from orchestrator.db.registry import list_models
from orchestrator.db.rows import ModelRow
from orchestrator.planning.pipeline import pipeline_of
from orchestrator.service import Service
from quant_spec.errors import InvalidInputError
from quant_spec.keys import canonical_json
from quant_spec.tasks import fuse
from workers.storage.blobs import digest_of_file
from workers.storage.manifest import read_files
from workers.storage.plain_files import file_within
from workers.storage.safetensors_check import check_finite

_NAME_LENGTH = 100
_MOST = 100.0


@dataclass(frozen=True, slots=True)
class Lora:
    """A safetensors file, and how much of it is added."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read FILE or FILE:SCALE.

        Raises
        ------
        InvalidInputError
            If there is no such file, or the scale is no number from -100 to 100.
        """
        name, colon, number = text.rpartition(":")
        if not colon or Path(text).is_file():
            name, number = text, "1"
        try:
            scale = float(number)
        except ValueError:
            scale = float("nan")
        if not abs(scale) <= _MOST:
            raise InvalidInputError(f"--lora: got scale {number!r}, wanted a number from -100 to 100, as in FILE:0.8")
        path = Path(name).expanduser()
        if path.suffix != ".safetensors" or not path.is_file():
            raise InvalidInputError(f"--lora: got {name}, wanted a safetensors file that exists")
        return cls(path, scale)


def with_loras(
    service: Service, base: ModelRow, loras: Sequence[Lora], *, notify: Callable[[str], None], dry_run: bool = False
) -> ModelRow:
    """Return the model that a pipeline becomes with LoRA files fused; it is not registered.

    Parameters
    ----------
    base
        Its bytes are in the service's store, but for a dry run.
    dry_run
        Fuse nothing: the row then has a digest of no tree, unless this was fused before.

    Raises
    ------
    InvalidInputError
        If the model is a bare denoiser, or a file cannot be read.
    TaskError
        If a file does not fit the pipeline.
    """
    if pipeline_of(base) is None:
        raise InvalidInputError(
            f"--lora: got it for model {base.name}, a bare denoiser, wanted a whole pipeline, whose loader reads LoRAs"
        )
    told: list[dict[str, Any]] = []
    for lora in loras:
        path = file_within(lora.path, (lora.path.resolve().parent,), "--lora", error=InvalidInputError)
        if not check_finite(path):
            raise InvalidInputError(f"--lora: got {lora.path} without a tensor, wanted a LoRA")
        told.append({"file": lora.path.name, "sha256": digest_of_file(path), "scale": lora.scale})
    inspection = {**base.inspection, LORAS: [*base.inspection.get(LORAS, ()), *told], FUSED_FROM: base.digest}
    with service.database.session(read_only=True) as session:
        known = [row for row in list_models(session) if _same(row.inspection, inspection)]
    if known:
        return known[0]
    stems = "-".join(lora.path.stem.lower() for lora in loras)
    stem = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stems)
    row = replace(base, name=f"{base.name}-{stem}"[:_NAME_LENGTH].rstrip("-._"), inspection=inspection, created_at=None)
    if dry_run:
        return replace(row, digest=hashlib.sha256(canonical_json([base.digest, told]).encode()).hexdigest())
    notify(f"fusing {', '.join(lora.path.name for lora in loras)} into {base.name}")
    digests = tuple(service.store.put_file(lora.path) for lora in loras)
    inputs = fuse.Inputs(model=base.digest, loras=digests)
    made = run_task(service.settings, fuse.KIND, fuse.Params(scales=tuple(lora.scale for lora in loras)), inputs)
    digest = made.outputs[fuse.FUSED]
    size = sum(size for _, size in read_files(service.store, digest).values())
    return replace(row, digest=digest, bytes=size)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two inspections tell of the same files fused into the same model; files by their bytes."""
    if one.get(FUSED_FROM) != other[FUSED_FROM]:
        return False
    fused = [[(each["sha256"], each["scale"]) for each in found[LORAS]] for found in (one, other)]
    return fused[0] == fused[1]
