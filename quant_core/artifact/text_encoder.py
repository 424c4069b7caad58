"""Text encoders of transformers with packed weights: made from a folder and calls of it, and written as a folder.

    config.json          transformers' own, plus `quantization_config` (`quant_spec.quantization_config`)
    model.safetensors    packed weights of all Linear layers; embeddings and norms as they were, in name and dtype

`from_pretrained` of transformers loads it once `quant_core` is imported (`quant_core.artifact.transformers_quantizer`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quant_core.artifact.folder import CONFIG_FILE
from quant_core.diffusion.encoder_calls import Call
from quant_core.errors import ArtifactError
from quant_core.fit.linear_tree import LinearTree, round_linear_tree
from quant_core.nn.layers import QuantLayer
from quant_spec.documents import read_json_file
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import QUANT_METHOD, quantization_config

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class RoundedEncoder:
    """What became of a text encoder: `layers`, the dB that rounding leaves of each; bytes of its weights file."""

    layers: dict[str, float]
    bytes: int


def quantize_text_encoder(
    source: Path, calls: Sequence[Call], config: LinearTree, target: Path, *, device: str | None = None
) -> RoundedEncoder:
    """Round the Linear weights of a text encoder and write it as a folder.

    Parameters
    ----------
    source : Path
        Folder of a transformers model, such as `text_encoder_3` of a pipeline.
    calls : sequence of Call
        What the pipeline calls the encoder with (`quant_core.diffusion.encoder_calls`).
    target : Path
        Absent or empty; created.

    Raises
    ------
    ArtifactError
        If the source does not load as a model of transformers, or is quantized already, or the target holds something.
    QuantizationError
        If there is nothing to round.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"folder: got {target} that exists and is not empty, wanted a new or empty folder")
    model, base_config = load_text_encoder(source)
    if device is not None:
        model.to(device)
    where = next(model.parameters()).device
    moved = [Call(*tree_map(lambda leaf: _moved(leaf, where), (call.args, dict(call.kwargs)))) for call in calls]
    layers = round_linear_tree(model, moved, config)
    model_format = ModelFormat({n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLayer)}, {})
    target.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in base_config.items() if key != "_name_or_path"}
    data = {**kept, "quantization_config": quantization_config(model_format)}
    (target / CONFIG_FILE).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_tensors(model, _dtypes(source)), target / WEIGHTS_FILE, metadata={"format": "pt"})
    return RoundedEncoder(layers, (target / WEIGHTS_FILE).stat().st_size)


def packed_text_encoders(root: Path) -> list[Path]:
    """Return the folders of a pipeline's text encoders that we packed, by name."""
    found = []
    for config in sorted(root.glob(f"*/{CONFIG_FILE}")):
        data = read_json_file(config, error=ArtifactError)
        method = (data.get("quantization_config") or {}).get("quant_method")
        if method == QUANT_METHOD and data.get("architectures"):
            found.append(config.parent)
    return found


def write_dequantized(source: Path, target: Path) -> None:
    """Write the float16 weights that a packed text encoder's codes stand for, as a folder that transformers loads."""
    import transformers

    data = read_json_file(source / CONFIG_FILE, error=ArtifactError)
    cls = getattr(transformers, data["architectures"][0])
    model = cls.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    state = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    for name, tensor in _tensors(model, {}).items():
        if not name.startswith(tuple(f"{each}." for each in layers)) or name.endswith(".bias"):
            state[name] = tensor.half() if tensor.is_floating_point() else tensor
    for name, layer in layers.items():
        state[f"{name}.weight"] = layer.unscaled(layer.weight).detach().cpu().half().contiguous()
    target.mkdir(parents=True)
    plain = {key: value for key, value in data.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    text = json.dumps({**plain, "dtype": "float16"}, indent=2, sort_keys=True) + "\n"
    (target / CONFIG_FILE).write_text(text, encoding="utf-8")
    save_file(dict(sorted(state.items())), target / WEIGHTS_FILE, metadata={"format": "pt"})


def load_text_encoder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Load a full-precision model of transformers in float32, in eval mode; return it and its config.json.

    Raises
    ------
    ArtifactError
        If transformers is not installed, or the folder does not load.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArtifactError(f"{folder}: got a text encoder, and no transformers to load it with ({error})") from error
    try:
        data = read_json_file(folder / CONFIG_FILE, error=ArtifactError)
    except FileNotFoundError:
        raise ArtifactError(f"{folder / CONFIG_FILE}: no such file") from None
    name = next(iter(data.get("architectures") or ()), None)
    cls = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArtifactError(f"{folder}: got class {name!r}, wanted a model class of transformers")
    if "quantization_config" in data:
        raise ArtifactError(f"{folder}: got a model that is quantized already, wanted one in full precision")
    try:
        loader = cast(Any, cls)
        model: nn.Module = loader.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"{folder}: does not load as {name}: {str(error).strip().splitlines()[0]}") from error
    return model.eval().requires_grad_(False), data


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor in a folder's safetensors files."""
    found: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # not a mapping
    return found


def _tensors(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the tensors to write: those of quantized layers as they are, others in the dtype that they came in.

    Tensors that share memory, as tied embeddings do, are written once, under a name that the source has.
    """
    own = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, QuantLayer))
    written: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    state = model.state_dict()
    for name in sorted(state, key=lambda name: (name not in dtypes, name)):
        tensor = state[name]
        place = (tensor.data_ptr(), tensor.numel())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        is_packed = name.startswith(own) and not name.endswith(".bias")
        dtype = tensor.dtype if is_packed else dtypes.get(name, tensor.dtype)
        written[name] = tensor.detach().to("cpu", dtype).contiguous().clone()
    return dict(sorted(written.items()))
