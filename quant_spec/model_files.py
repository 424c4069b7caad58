"""Names of the files of a model folder, as diffusers writes it, and where they are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Folders of a denoiser in a model folder, where it does not lie in that folder itself; first match first.
DENOISER_FOLDERS = ("denoiser", "unet", "transformer")
SCHEDULER_FILE = "scheduler/scheduler_config.json"
#: Prompts' conditioning, one row each, beside a bare denoiser.
CONDITIONING_FILE = "conditioning.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
#: SHA-256 and bytes of every other file of a published folder.
MANIFEST_FILE = "manifest.json"


def first_file(folders: Sequence[Path], name: str) -> Path | None:
    """Return the file of the first of `folders` that has one of that name."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
