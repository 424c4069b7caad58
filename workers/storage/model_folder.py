"""Model folders as users have them: find the denoiser, refuse what cannot work, copy the rest into the store.

A model in the store is a tree with fixed paths, so that the same config and weights have the same digest wherever they
came from: `denoiser/config.json`, `denoiser/*.safetensors` (and their index), `scheduler/scheduler_config.json` and
`conditioning.safetensors` where there are any, and `model_index.json` with the pipeline's decoders where samples would
be taken for pixels without it. A whole pipeline (`workers.storage.components`) keeps its own paths, with all its
components and its `model_index.json`; one that has a `conditioning.safetensors` counts as a denoiser alone.
`hf:owner/name@revision` is fetched from the Hugging Face Hub first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_spec.documents import read_json_file
from quant_spec.keys import canonical_json
from quant_spec.model_files import CONDITIONING_FILE, DENOISER_FOLDERS, SCHEDULER_FILE, first_file
from quant_spec.pipeline import MODEL_INDEX
from workers.errors import ModelError
from workers.storage.blobs import digest_of, digest_of_file
from workers.storage.components import Components, check_documents, component_patterns, find_components
from workers.storage.manifest import manifest_digest, put_manifest
from workers.storage.pipeline_index import read_decoders
from workers.storage.plain_files import file_within
from workers.storage.safetensors_check import check_finite, read_header
from workers.storage.store import Store
from workers.storage.weights import INDEX, WEIGHT_PATTERNS, find_weights

#: Where a denoiser may lie in a model folder, first match first; the first is the folder itself.
_SUBFOLDERS = ("", *DENOISER_FOLDERS)

#: Side of a square sample or length of a signal, or one number for each dimension.
SampleSize = int | tuple[int, ...]
# What diffusers notes about where a config came from; no part of what the model is.
_PLACES = {"_name_or_path"}
_HUB = "hf:"
_WEIGHTS = ".safetensors"
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_HUB_CONFIGS = [
    *(f"{subfolder}/config.json".lstrip("/") for subfolder in _SUBFOLDERS),
    SCHEDULER_FILE,
    CONDITIONING_FILE,
    MODEL_INDEX,
]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A denoiser on disk: its folder and what lies beside it.

    `denoiser_subfolder` is "" where the folder that was given is the denoiser's own; `components` are the rest of a
    whole pipeline, `left_out` says why there are none though there is an index.
    """

    denoiser: Path
    denoiser_subfolder: str
    scheduler: Path | None
    conditioning: Path | None
    class_name: str
    config: Mapping[str, Any]
    components: Components | None = None
    left_out: str = ""

    @property
    def stored_as(self) -> str:
        """The denoiser's folder in the store."""
        return "denoiser" if self.components is None else self.denoiser_subfolder


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model in the store: its tree's digest, its files' bytes, and the numbers in its weights.

    `form` is the digest of all that it consists of but its weights' values: the same for all fine-tunes of a model.
    `left_out` as a folder's.
    """

    digest: str
    form: str
    class_name: str
    bytes: int
    parameters: int
    left_out: str = ""


def find_model(path: Path, *, alone: bool = False) -> ModelFolder:
    """Find the denoiser in a model folder.

    Parameters
    ----------
    path
        A pipeline's folder, with the denoiser in `unet/`, `transformer/` or `denoiser/`; or the denoiser's own, with
        `scheduler/` in it or beside it.
    alone
        Do not look for other components.

    Raises
    ------
    ModelError
        If there is no such folder, no `config.json` that names a class, or the model is quantized already.
    """
    if not path.is_dir():
        raise ModelError(f"model: got {path}, which is not a folder, wanted a diffusers model folder")
    for subfolder in _SUBFOLDERS:
        home = path / subfolder
        config = _read_config(home / "config.json")
        if config is None:
            continue
        if config.get("quantization_config") is not None:
            raise ModelError(f"{home}/config.json: got a quantized model, wanted full precision")
        beside = (path,) if subfolder else (path, path.resolve().parent)
        conditioning, class_name = first_file(beside, CONDITIONING_FILE), str(config["_class_name"])
        is_alone = alone or conditioning is not None
        components, left_out = (None, "") if is_alone else find_components(path, subfolder, class_name)
        return ModelFolder(
            denoiser=home,
            denoiser_subfolder=subfolder,
            scheduler=first_file(beside, SCHEDULER_FILE),
            conditioning=conditioning,
            components=components,
            class_name=class_name,
            config=config,
            left_out=left_out,
        )
    raise ModelError(f"{path}: got no config.json with a _class_name, wanted one there or in unet/ or transformer/")


def _read_config(path: Path) -> dict[str, Any] | None:
    """Return a model's config, or None if this is not one."""
    if not path.exists():
        return None
    config = read_json_file(path, error=ModelError)
    if not isinstance(config, dict) or "_class_name" not in config:
        return None
    name = config["_class_name"]
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        raise ModelError(f"{path}: got _class_name {str(name)[:80]!r}, wanted the name of a class")
    return config


def check_model(folder: ModelFolder) -> int:
    """Read every weight, and the configs of other components; return how many numbers there are.

    Raises
    ------
    ModelError
        If there are no weights, only pickles, a file is truncated, or a tensor holds NaN or infinite numbers.
    """
    if folder.components is not None:
        check_documents(folder.components)
    names: dict[str, Path] = {}
    parameters = 0
    for path in find_weights(folder.denoiser).files.values():
        for entry in check_finite(path):
            if entry.name in names:
                raise ModelError(f"{path}: got {entry.name}, which {names[entry.name].name} has too, wanted it once")
            names[entry.name] = path
            parameters += entry.count
    if not parameters:
        raise ModelError(f"{folder.denoiser}: got weight files without a tensor, wanted weights")
    if folder.conditioning is not None:
        check_finite(folder.conditioning)
    if folder.components is not None:
        for path in folder.components.weights.values():
            check_finite(path)
    return parameters


def check_places(folder: ModelFolder, given: Path, allowed: Sequence[Path] = ()) -> None:
    """Refuse a model folder whose links lead out of it, so that no other file of this machine is taken for weights.

    The Hub's cache is made of links: there, all of a repository counts as the folder.

    Raises
    ------
    ModelError
        If a file really lies neither in the folder nor in one of `allowed`, or is no plain file.
    """
    real = given.resolve()
    # What lies beside a denoiser's own folder belongs to its pipeline's.
    roots = [real, *([] if folder.denoiser_subfolder else [real.parent])]
    if real.parent.name == "snapshots":
        roots.append(real.parent.parent)
    weights = find_weights(folder.denoiser)
    beside = [folder.scheduler, folder.conditioning]
    if folder.components is not None:
        beside += [each for each in folder.components.files.values() if isinstance(each, Path)]
    for path in (folder.denoiser / "config.json", *weights.files.values(), *(each for each in beside if each)):
        file_within(path, (*roots, *allowed), "model", error=ModelError)


def import_model(
    store: Store, path: Path, sample_size: SampleSize | None = None, *, allowed: Sequence[Path] = ()
) -> ModelRecord:
    """Check a model folder and copy what a job needs of it into the store.

    Parameters
    ----------
    store
        Where to.
    path
        As for `find_model`.
    sample_size
        Of a sample, without channels; takes the place of the config's `sample_size`, so the digest tells it.
    allowed
        Folders that the model folder's links may lead to, besides itself.

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
    check_places(folder, path, allowed)
    parameters = check_model(folder)
    tree = _tree(folder, sample_size)
    put = {
        name: (store.put_file(each), each.stat().st_size)
        if isinstance(each, Path)
        else (store.put_bytes(each), len(each))
        for name, each in tree.items()
    }
    return ModelRecord(
        digest=put_manifest(store, put),
        form=_form(tree, {name: digest for name, (digest, _) in put.items()}),
        class_name=folder.class_name,
        bytes=sum(size for _, size in put.values()),
        parameters=parameters,
        left_out=folder.left_out,
    )


def _form(tree: Mapping[str, Path | bytes], digests: Mapping[str, str]) -> str:
    """Return the digest of a model's files, its weights told by names, dtypes and shapes."""
    told: dict[str, Any] = dict(digests)
    for name, each in tree.items():
        if isinstance(each, Path) and name.endswith(_WEIGHTS) and name != CONDITIONING_FILE:
            told[name] = sorted([entry.name, entry.dtype, list(entry.shape)] for entry in read_header(each))
    return digest_of(canonical_json(told).encode())


def model_digest(path: Path, sample_size: SampleSize | None = None) -> str:
    """Return the digest that a model folder would have in the store, by reading its files; see `import_model`.

    Raises
    ------
    ModelError
        If it is not a model folder, or its weights are not there.
    """
    tree = _tree(find_model(path), sample_size)
    return manifest_digest(
        {
            name: (digest_of_file(each), each.stat().st_size)
            if isinstance(each, Path)
            else (digest_of(each), len(each))
            for name, each in tree.items()
        }
    )


def changed_since(path: Path, epoch: float) -> bool:
    """Say whether any file of a model folder was written, or put in place, after a time in seconds since 1970.

    Raises
    ------
    ModelError
        As `model_digest`.
    """
    folder = find_model(path)
    files = [each for each in _tree(folder).values() if isinstance(each, Path)]
    files += [each for each in (folder.denoiser / "config.json", folder.scheduler) if each is not None]
    # The time of the last change of the entry, which no copying or unpacking sets back.
    return any(max(each.stat().st_ctime, each.lstat().st_ctime) > epoch for each in files)


def _tree(folder: ModelFolder, sample_size: SampleSize | None = None) -> dict[str, Path | bytes]:
    """Return what a model consists of: its paths in the store, each with a file or the bytes themselves."""
    sized = {} if sample_size is None else {"sample_size": sample_size}
    home = folder.stored_as
    tree: dict[str, Path | bytes] = {f"{home}/config.json": _config_bytes({**folder.config, **sized})}
    weights = find_weights(folder.denoiser)
    tree |= {f"{home}/{name}": path for name, path in weights.files.items()}
    if weights.index is not None:
        tree[f"{home}/{INDEX}"] = weights.index
    if folder.scheduler is not None:
        scheduler = _read_config(folder.scheduler)
        if scheduler is None:
            raise ModelError(f"{folder.scheduler}: got no _class_name, wanted a diffusers scheduler config")
        tree[SCHEDULER_FILE] = _config_bytes(scheduler)
    if folder.components is not None:
        return tree | dict(folder.components.files) | {MODEL_INDEX: _config_bytes(folder.components.index)}
    decoders = read_decoders(folder.denoiser, folder.config)
    if decoders is not None:
        tree[MODEL_INDEX] = _config_bytes(decoders)
    if folder.conditioning is not None:
        tree[CONDITIONING_FILE] = folder.conditioning
    return tree


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return a config in one form, without the place it came from."""
    kept = {key: value for key, value in config.items() if key not in _PLACES}
    return json.dumps(kept, sort_keys=True, indent=2).encode()


def resolve_source(source: str) -> Path:
    """Return the local folder of a model.

    Parameters
    ----------
    source
        A folder's path, returned as it is; or `hf:owner/name` or `hf:owner/name@revision`, of which the denoiser's
        files, the scheduler's config and the pipeline's other components are fetched into the Hub's usual cache, and
        nothing else.

    Raises
    ------
    ModelError
        If there is no such repository or revision, it is not open to us, or the Hub cannot be reached.
    """
    if not source.startswith(_HUB):
        return Path(source).expanduser()
    repository, _, revision = source.removeprefix(_HUB).partition("@")
    folder = _fetch(source, repository, revision or None, _HUB_CONFIGS)
    found = find_model(folder, alone=True)
    patterns = hub_patterns(found.denoiser_subfolder)
    if found.conditioning is None:
        patterns += component_patterns(folder, found.denoiser_subfolder)
    # The commit that was found first: a branch may move between the two calls.
    return _fetch(source, repository, folder.name, patterns)


def hub_patterns(subfolder: str) -> list[str]:
    """Return the patterns of a repository's files that may be the weights of the denoiser in a subfolder ("": none)."""
    return [f"{subfolder}/{pattern}".lstrip("/") for pattern in WEIGHT_PATTERNS]


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
