"""Model folders as users have them: find the denoiser, refuse what cannot work, copy the rest into the store.

A model in the store is a tree with fixed paths, so that the same config and weights have the same digest wherever they
came from: `denoiser/config.json`, `denoiser/*.safetensors` (and their index), `scheduler/scheduler_config.json` and
`conditioning.safetensors` where there are any. `hf:owner/name@revision` is fetched from the Hugging Face Hub first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ModelError
from workers.storage.manifest import put_manifest
from workers.storage.safetensors_check import check_finite
from workers.storage.store import Store

#: Where a denoiser may lie in a model folder, first match first; the first is the folder itself.
DENOISER_SUBFOLDERS = ("", "denoiser", "unet", "transformer")
CONDITIONING_FILE = "conditioning.safetensors"
SCHEDULER_PATH = "scheduler/scheduler_config.json"

#: Side of a square sample or length of a signal, or one number for each dimension.
SampleSize = int | tuple[int, ...]

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
# What diffusers notes about where a config came from; no part of what the model is.
_PLACES = {"_name_or_path"}
_HUB = "hf:"
_HUB_CONFIGS = [
    *(f"{subfolder}/config.json".lstrip("/") for subfolder in DENOISER_SUBFOLDERS),
    SCHEDULER_PATH,
    CONDITIONING_FILE,
]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A denoiser on disk: its folder and what lies beside it.

    `denoiser_subfolder` is "" where the folder that was given is the denoiser's own.
    """

    denoiser: Path
    denoiser_subfolder: str
    scheduler: Path | None
    conditioning: Path | None
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model in the store: its tree's digest, its files' bytes, and the numbers in its weights."""

    digest: str
    class_name: str
    bytes: int
    parameters: int


def find_model(path: Path) -> ModelFolder:
    """Find the denoiser in a model folder.

    Parameters
    ----------
    path
        A pipeline's folder, with the denoiser in `unet/`, `transformer/` or `denoiser/`; or the denoiser's own, with
        `scheduler/` in it or beside it.

    Raises
    ------
    ModelError
        If there is no such folder, no `config.json` that names a class, or the model is quantized already.
    """
    if not path.is_dir():
        raise ModelError(f"model: got {path}, which is not a folder, wanted a diffusers model folder")
    for subfolder in DENOISER_SUBFOLDERS:
        home = path / subfolder
        config = _read_config(home / "config.json")
        if config is None:
            continue
        if config.get("quantization_config") is not None:
            raise ModelError(f"{home}/config.json: got a quantized model, wanted full precision")
        beside = (path,) if subfolder else (path, path.resolve().parent)
        return ModelFolder(
            denoiser=home,
            denoiser_subfolder=subfolder,
            scheduler=_first(beside, SCHEDULER_PATH),
            conditioning=_first(beside, CONDITIONING_FILE),
            class_name=str(config["_class_name"]),
            config=config,
        )
    raise ModelError(f"{path}: got no config.json with a _class_name, wanted one there or in unet/ or transformer/")


def _read_config(path: Path) -> dict[str, Any] | None:
    """Return a model's config, or None if this is not one."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: got text that is not JSON ({error}), wanted a diffusers config") from error
    return config if isinstance(config, dict) and "_class_name" in config else None


def _first(folders: tuple[Path, ...], name: str) -> Path | None:
    """Return the first of `folders` that holds the file."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def find_weights(folder: Path) -> list[Path]:
    """Return the safetensors files of a denoiser's folder: one, or the shards that its index names.

    Raises
    ------
    ModelError
        If there are none, only pickles, several that no index joins, or the index names files that are not there.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        return _shards(folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{folder}: got several weight files ({names}) and no {_INDEX}, wanted one file or an index")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: got weights as pickles only ({pickles[0]}), which are never loaded, wanted safetensors"
        )
    raise ModelError(f"{folder}: got no weights, wanted {_WEIGHTS}")


def _shards(folder: Path) -> list[Path]:
    """Return the files that the index names."""
    try:
        names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / _INDEX}: got no weight_map, wanted an index of shards") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder / _INDEX}: got {name!r}, which is not in the folder, wanted every shard there")
    return [folder / name for name in names]


def check_model(folder: ModelFolder) -> int:
    """Read every weight, and return how many numbers there are.

    Raises
    ------
    ModelError
        If there are no weights, only pickles, a file is truncated, or a tensor holds NaN or infinite numbers.
    """
    names: dict[str, Path] = {}
    parameters = 0
    for path in find_weights(folder.denoiser):
        for entry in check_finite(path):
            if entry.name in names:
                raise ModelError(f"{path}: got {entry.name}, which {names[entry.name].name} has too, wanted it once")
            names[entry.name] = path
            parameters += entry.count
    if not parameters:
        raise ModelError(f"{folder.denoiser}: got weight files without a tensor, wanted weights")
    if folder.conditioning is not None:
        check_finite(folder.conditioning)
    return parameters


def import_model(store: Store, path: Path, sample_size: SampleSize | None = None) -> ModelRecord:
    """Check a model folder and copy what a job needs of it into the store.

    Parameters
    ----------
    store
        Where to.
    path
        As for `find_model`.
    sample_size
        Of a sample, without channels; takes the place of the config's `sample_size`, so the digest tells it.

    Returns
    -------
    ModelRecord
        The same for the same config and weights, wherever they lie.

    Raises
    ------
    ModelError
        If the folder is not a model that can be used; nothing was stored.
    """
    folder = find_model(path)
    parameters = check_model(folder)
    scheduler = None if folder.scheduler is None else _read_config(folder.scheduler)
    if folder.scheduler is not None and scheduler is None:
        raise ModelError(f"{folder.scheduler}: got no _class_name, wanted a diffusers scheduler config")
    sized = {} if sample_size is None else {"sample_size": sample_size}
    files = {"denoiser/config.json": _put_config(store, {**folder.config, **sized})}
    weights = find_weights(folder.denoiser)
    if (folder.denoiser / _INDEX).is_file() and weights[0].name != _WEIGHTS:
        files |= {f"denoiser/{shard.name}": _put_file(store, shard) for shard in weights}
        files[f"denoiser/{_INDEX}"] = _put_file(store, folder.denoiser / _INDEX)
    else:
        files[f"denoiser/{_WEIGHTS}"] = _put_file(store, weights[0])
    if scheduler is not None:
        files[SCHEDULER_PATH] = _put_config(store, scheduler)
    if folder.conditioning is not None:
        files[CONDITIONING_FILE] = _put_file(store, folder.conditioning)
    return ModelRecord(
        digest=put_manifest(store, files),
        class_name=folder.class_name,
        bytes=sum(size for _, size in files.values()),
        parameters=parameters,
    )


def _put_config(store: Store, config: Mapping[str, Any]) -> tuple[str, int]:
    """Store a config in one form, without the place it came from; return its digest and bytes."""
    kept = {key: value for key, value in config.items() if key not in _PLACES}
    data = json.dumps(kept, sort_keys=True, indent=2).encode()
    return store.put_bytes(data), len(data)


def _put_file(store: Store, path: Path) -> tuple[str, int]:
    """Store a file; return its digest and bytes."""
    return store.put_file(path), path.stat().st_size


def resolve_source(source: str) -> Path:
    """Return the local folder of a model.

    Parameters
    ----------
    source
        A folder's path, returned as it is; or `hf:owner/name` or `hf:owner/name@revision`, of which the denoiser's
        files and the scheduler's config are fetched into the Hub's usual cache, and nothing else.

    Raises
    ------
    ModelError
        If there is no such repository or revision, it is not open to us, or the Hub cannot be reached.
    """
    if not source.startswith(_HUB):
        return Path(source).expanduser()
    repository, _, revision = source.removeprefix(_HUB).partition("@")
    folder = _fetch(source, repository, revision or None, _HUB_CONFIGS)
    home = find_model(folder).denoiser_subfolder
    inside = f"{home}/" if home else ""
    # The commit that was found first: a branch may move between the two calls.
    return _fetch(source, repository, folder.name, [f"{inside}*.safetensors", f"{inside}*.safetensors.index.json"])


def _fetch(source: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch some files of a repository, and return the folder of its snapshot."""
    # Imported here: half a second that models in folders do not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{source}: got {reason}, wanted hf:owner/name@revision that the Hub lets us read") from error
