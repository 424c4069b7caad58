"""The components of a whole pipeline beside its denoiser: text encoders, tokenizers, decoders, as a folder has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_spec.documents import read_json, read_json_file, read_plain_file
from quant_spec.model_files import WEIGHTS_FILE
from quant_spec.pipeline import DECODERS, LIBRARIES, MODEL_INDEX, component_entries, is_whole
from workers.errors import ModelError
from workers.storage.weights import WEIGHT_PATTERNS, find_weights

SCHEDULER = "scheduler"
#: Denoisers that are told sample and timestep, at most a class; the pipelines of diffusers around them pass on neither.
_PROMPTLESS = frozenset({"UNet1DModel", "UNet2DModel"})
_NAMES = {"diffusers": WEIGHTS_FILE, "transformers": "model.safetensors"}
#: What a component is made of besides weights: configs, vocabularies, merges, chat templates.
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
# Tokenizers of 262,144 words have 34 MB and two million values.
_LONGEST_BYTES, _MOST_VALUES = 64 << 20, 4_000_000


@dataclass(frozen=True, slots=True)
class Components:
    """A pipeline's index, and the files of its components, by their path in the store; `weights` are those with
    numbers in them."""

    index: Mapping[str, Any]
    files: Mapping[str, Path | bytes]
    weights: Mapping[str, Path]


def find_components(root: Path, denoiser: str, class_name: str = "") -> tuple[Components | None, str]:
    """Find what a pipeline's folder holds beside its denoiser and its scheduler.

    Parameters
    ----------
    root
        The pipeline's folder.
    denoiser
        The name of its denoiser's folder.
    class_name
        The denoiser's class.

    Returns
    -------
    Components or None
        None if the folder counts as a denoiser alone: no index, or one that names no pipeline, not this denoiser or
        nothing else, or whose components lie elsewhere, or nothing but a decoder around a UNet on samples and timesteps
        (latent diffusion without prompts), whose pipeline has no prompts or labels to be run with.
    str
        What is the matter with the index, if that is why; else empty.

    Raises
    ------
    ModelError
        If the index is no JSON object, or a component is of a library that is not read, or has no weights that can be
        read.
    """
    path = root / MODEL_INDEX
    if not denoiser or not path.is_file():
        return None, ""
    index = read_json_file(path, error=ModelError)
    if not isinstance(index, dict):
        raise ModelError(f"{path}: got {type(index).__name__}, wanted an object that names a pipeline's components")
    if not is_whole(index):
        return None, f"{path} names no pipeline (_class_name)"
    if denoiser not in component_entries(index):
        return None, f"{path} does not name {denoiser}"
    others = {name: entry for name, entry in component_entries(index).items() if name not in (denoiser, SCHEDULER)}
    if missing := [name for name in others if not (root / name).is_dir()]:
        return None, f"{path} names {', '.join(missing)}, got no such folder"
    if not others or (class_name in _PROMPTLESS and all(name in DECODERS for name in others)):
        return None, ""
    files: dict[str, Path | bytes] = {}
    weights: dict[str, Path] = {}
    for name, (library, class_name) in others.items():
        if library not in LIBRARIES:
            raise ModelError(
                f"{path}: {name}: got a component of {library!r} ({class_name}), wanted one of {', '.join(LIBRARIES)}"
            )
        folder = root / name
        texts = {each for pattern in _TEXTS for each in folder.glob(pattern) if ".safetensors.index" not in each.name}
        files |= {f"{name}/{each.name}": each for each in texts if each.is_file()}
        if (folder / "config.json").is_file():
            found = find_weights(folder, _NAMES[library])
            weights |= {f"{name}/{each}": file for each, file in found.files.items()}
            if found.index is not None:
                files[f"{name}/{_NAMES[library]}.index.json"] = found.index
    return Components(index, files | weights, weights), ""


def check_documents(components: Components) -> None:
    """Read every JSON file of the components, as whoever loads them will.

    Raises
    ------
    ModelError
        If one is not JSON, or is nested too deeply or too large.
    """
    for name in sorted(components.files):
        path = components.files[name]
        if isinstance(path, Path) and path.suffix == ".json":
            data = read_plain_file(path, _LONGEST_BYTES, error=ModelError)
            read_json(data, str(path), error=ModelError, longest=_LONGEST_BYTES, most_values=_MOST_VALUES)


def component_patterns(root: Path, denoiser: str) -> list[str]:
    """Return the patterns of a repository's files that may belong to a pipeline's components beside its denoiser."""
    path = root / MODEL_INDEX
    index = read_json_file(path, error=ModelError) if denoiser and path.is_file() else None
    if not isinstance(index, dict) or not is_whole(index):
        return []
    others = component_entries(index).keys() - {denoiser, SCHEDULER}
    return [f"{name}/{pattern}" for name in sorted(others) for pattern in (*_TEXTS, *WEIGHT_PATTERNS)]
