"""The artifact folder: what a packed model looks like on disk, and the checks before it is believed.

    config.json                            diffusers' own, plus `quantization_config`
    diffusion_pytorch_model.safetensors    packed weights and activation parameters; names as in the model's state dict
    scheduler/scheduler_config.json        the sampler that per-step parameters belong to
    recipe.json                            the resolved recipe, once published
    manifest.json                          sha256 and bytes of every other file, once published

The release of a whole pipeline has the first two in its denoiser's folder, and its other components beside it.

Tensor names end in `.qweight` (uint8 codes, packed as `kernels.packing` draws; where output channels have bits of their
own, also `.channel_bits`), `.scale` (float32; bfloat16 where each group has one), `.zero_point` and, where scales of
groups are whole numbers times an output channel's, `.multiplier` (less 1), both uint8, or packed as codes are where
that is smaller: `quant_core.artifact.compact` (no zero points of E4M3 numbers, whose `.qweight` is float8_e4m3fn),
`.low_rank_down` and `.low_rank_up` (bfloat16, where there is a branch) and `.bias`; those of activation quantizers lie
below `act_quantizers.` and `attention_quantizer.`. Everything that is not quantized keeps its name and dtype. There is
no pickle in it, and the same model gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_core.artifact.compact import grid_bits, pack_grids
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer
from quant_spec import model_files
from quant_spec.documents import read_json_file
from quant_spec.errors import QuantizationError
from quant_spec.formats import ModelFormat
from quant_spec.pipeline import MODEL_INDEX, denoiser_entry
from quant_spec.quantization_config import parse_quantization_config as parse_config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = model_files.WEIGHTS_FILE
SCHEDULER_FILE = model_files.SCHEDULER_FILE
MANIFEST_FILE = model_files.MANIFEST_FILE
RECIPE_FILE = "recipe.json"
_READ_BYTES = 1 << 20


def parse_quantization_config(data: Mapping[str, Any]) -> ModelFormat:
    """Read the `quantization_config` of config.json.

    Raises
    ------
    ArtifactError
        If it is another tool's, of another version, or malformed.
    """
    try:
        return parse_config(data)
    except QuantizationError as error:
        raise ArtifactError(str(error)) from error


def write_artifact(
    model: nn.Module,
    base_config: Mapping[str, Any],
    config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Write a quantized model as a folder that diffusers loads.

    Parameters
    ----------
    model : Module
        Quantized in place by `build_quantized`, codes and ranges set.
    base_config : mapping
        config.json of the full-precision model.
    config : mapping
        As from `quant_spec.quantization_config.quantization_config`.
    scheduler_config : mapping or None
        Of the sampler that was calibrated for.
    folder : Path
        Absent or empty; created.

    Raises
    ------
    ArtifactError
        If the folder holds something, or a layer's rounding is still being learned.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"artifact folder: got {folder} that exists and is not empty, wanted a new or empty folder")
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer) and module.soft_weight is not None:
            raise ArtifactError(f"layer {name}: got a rounding that is still being learned, wanted packed codes")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in base_config.items() if key != "_name_or_path"}
    _write_json(folder / CONFIG_FILE, {**kept, "quantization_config": dict(config)})
    tensors = _apart({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
    pack_grids(tensors, grid_bits(model))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if scheduler_config is not None:
        (folder / SCHEDULER_FILE).parent.mkdir()
        _write_json(folder / SCHEDULER_FILE, scheduler_config)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which none shares memory with another, which safetensors refuses; those that do are copied."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def scheduler_json(scheduler: Any) -> bytes:
    """Return scheduler_config.json of a diffusers scheduler, as `write_artifact` writes it."""
    return _json_bytes(json.loads(scheduler.to_json_string()))


def packed_home(folder: Path) -> Path:
    """Return where the packed denoiser of a release lies: in its folder, or in that of a whole pipeline's denoiser."""
    if (folder / CONFIG_FILE).is_file() or not (folder / MODEL_INDEX).is_file():
        return folder
    name = denoiser_entry(_read_json(folder / MODEL_INDEX))
    return folder if name is None else folder / name


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of an artifact folder, its `quantization_config` checked.

    Raises
    ------
    ArtifactError
        If there is none, or the folder does not hold a model that we quantized.
    """
    config = _read_json(folder / CONFIG_FILE)
    if not isinstance(config.get("quantization_config"), dict):
        raise ArtifactError(
            f"{folder / CONFIG_FILE}: got no quantization_config, wanted a model quantized by Quantmill"
        )
    parse_quantization_config(config["quantization_config"])
    return config


def verify_folder(folder: Path) -> None:
    """Check the files of an artifact folder before any is loaded.

    Every file that manifest.json names must be there, inside the folder, with its size and sha256; the files that
    loading reads must be among them. A folder without a manifest, as one that `save_pretrained` wrote, is checked for
    whole safetensors files only.

    Raises
    ------
    ArtifactError
        Naming the first file that is missing, escapes, is linked, or differs.
    """
    if (folder / MANIFEST_FILE).exists():
        _verify_manifest(folder)
    check_weights(packed_home(folder))


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors files, or with one that is not whole."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ArtifactError(f"{folder}: got no safetensors file, wanted {WEIGHTS_FILE}")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: got a truncated or damaged safetensors file ({error})") from error


def _verify_manifest(folder: Path) -> None:
    """Compare the folder with its manifest.json."""
    path = folder / MANIFEST_FILE
    manifest = _read_json(path)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict):
        raise ArtifactError(f"{path}: got format {manifest.get('format')!r}, wanted 1 with a table of files")
    home = packed_home(folder)
    for path in (home / CONFIG_FILE, *sorted(home.glob("*.safetensors*"))):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            raise ArtifactError(f"{folder / name}: got a file that manifest.json does not list")
    for name, entry in files.items():
        file = _inside(folder, name)
        if not isinstance(entry, dict) or not file.is_file():
            raise ArtifactError(f"{file}: listed in manifest.json, but missing")
        if file.stat().st_size != entry.get("bytes"):
            raise ArtifactError(
                f"{file}: got {file.stat().st_size} bytes, wanted {entry.get('bytes')} by manifest.json"
            )
        digest = _sha256(file)
        if digest != entry.get("sha256"):
            raise ArtifactError(f"{file}: got sha256 {digest}, wanted {entry.get('sha256')} by manifest.json")


def _inside(folder: Path, name: str) -> Path:
    """Return the file `name` below `folder`, refusing absolute, climbing and linked paths."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts:
        raise ArtifactError(f"{folder / MANIFEST_FILE}: got the path {name!r}, wanted one inside the folder")
    file = folder
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise ArtifactError(f"{file}: got a link, wanted a plain file")
    return file


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json_file(path, error=ArtifactError)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: got a JSON {type(data).__name__}, wanted an object")
    return data


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_bytes(_json_bytes(data))


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
