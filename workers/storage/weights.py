"""The weight files of a denoiser's folder: one safetensors file, or shards and the index that joins them.

A variant is a model saved under other names. diffusers writes `variant="fp16"` as
`diffusion_pytorch_model.fp16.safetensors` or, in shards, as `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`
with the index `diffusion_pytorch_model.safetensors.index.fp16.json` (earlier versions put the variant after the number
of the shard). In the store the files have the names of a model that is no variant: it is the same model, and loads as
one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_spec.documents import LONGEST_BYTES, read_json_file, read_plain_file
from quant_spec.model_files import WEIGHTS_FILE
from workers.errors import ModelError

INDEX = f"{WEIGHTS_FILE}.index.json"
#: What of a folder holds weights, as patterns of file names.
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index*.json")

_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of one set of weights, by the names that they have in the store, and the index of shards as JSON."""

    files: Mapping[str, Path]
    index: bytes | None = None


def find_weights(folder: Path, name: str = WEIGHTS_FILE) -> WeightFiles:
    """Find the weights of a component's folder: those that are no variant if there are any, else the only variant.

    Parameters
    ----------
    folder
        A denoiser's, or another component's.
    name
        Of the file that holds weights which are neither a variant nor shards: `model.safetensors` for transformers.

    Raises
    ------
    ModelError
        If there are none, only pickles, several variants, shards without an index, or an index names files that are
        not there.
    """
    for path in sorted(folder.glob("*.safetensors*")):
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: got what is no plain file, wanted weights in one")
    index = f"{name}.index.json"
    if (folder / name).is_file():
        return WeightFiles({name: folder / name})
    if (folder / index).is_file():
        shards = _shards(folder / index)
        return WeightFiles(
            {shard.name: shard for shard in shards}, read_plain_file(folder / index, LONGEST_BYTES, error=ModelError)
        )
    indexes = sorted(folder.glob(WEIGHT_PATTERNS[1]))
    files = sorted(folder.glob(WEIGHT_PATTERNS[0]))
    single = [path for path in files if not _SHARD.search(path.name)]
    if len(indexes) == 1 and not single:
        return _renamed(indexes[0], name)
    if len(files) == 1 and not indexes:
        return WeightFiles({name: files[0]})
    if indexes or files:
        names = ", ".join(path.name for path in [*indexes, *single] or files)
        wanted = f"one file or an index, or {name} among them"
        raise ModelError(f"{folder}: got several weight files ({names}) and no {index}, wanted {wanted}")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: got weights as pickles only ({pickles[0]}), which are never loaded, wanted safetensors"
        )
    raise ModelError(f"{folder}: got no weights, wanted {name}")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, by name."""
    names = sorted(set(_weight_map(index).values()), key=str)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ModelError(f"{index}: got {name!r}, which is not in the folder, wanted every shard there")
    return [index.parent / name for name in names]


def _renamed(index: Path, name: str) -> WeightFiles:
    """Return a variant's shards, and their index, as diffusers would have saved them without a variant."""
    shards = _shards(index)
    stem = name.removesuffix(".safetensors")
    names = {
        shard.name: f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number, shard in enumerate(shards, 1)
    }
    content = _read(index) | {"weight_map": {key: names[name] for key, name in _weight_map(index).items()}}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return WeightFiles({names[shard.name]: shard for shard in shards}, text.encode())


def _weight_map(index: Path) -> dict[str, Any]:
    """Return which file an index says that each tensor is in."""
    weight_map = _read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: got no weight_map, wanted an index of shards")
    return weight_map


def _read(index: Path) -> dict[str, Any]:
    content = read_json_file(index, error=ModelError)
    return content if isinstance(content, dict) else {}
