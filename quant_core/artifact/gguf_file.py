"""A release as a GGUF file: the codes of its Linear layers in blocks, everything else in float16 or float32.

Tensors have the names of the diffusers model, so that its `from_single_file` takes the file with the model's config.
Weights only: what the release does to activations is not in it. `quant_core.artifact.gguf_blocks` says what is rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.gguf_blocks import BLOCK, code_blocks, fitting_type, pack_blocks
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer

GGUF_FILE = "diffusion_pytorch_model.gguf"
#: Says that tensors have diffusers' names, which tools for other names then refuse.
ARCHITECTURE = "diffusers"
#: Most that float16 scales may change a layer's weights by, of their norm; ordinary ones do by 0.0005 at most.
_MOST_ROUNDED = 0.01
_MOST_HALF = 65504.0

Blocks = tuple[str, npt.NDArray[np.uint8]]


def write_gguf(model: nn.Module, config: Mapping[str, Any], path: Path, *, artifact: str) -> dict[str, int]:
    """Write a quantized model as a GGUF file.

    Parameters
    ----------
    model : Module
        Quantized, on the CPU; left as it is.
    config : mapping
        Its config.json.
    path : Path
        Of the new file.
    artifact : str
        Digest of the release, which the file names.

    Returns
    -------
    dict
        How many tensors have which of GGUF's types.

    Raises
    ------
    ArtifactError
        If no type of block holds some layer's codes; it names the layer and what would do. If diffusers does not load
        models of this class from single files.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    blocks = {f"{name}.weight": _blocks(name, layer) for name, layer in layers.items() if _has_blocks(name, layer)}
    if not hasattr(model, "from_single_file"):
        raise ArtifactError(
            f"model: got {type(model).__name__}, of which diffusers reads no single files, GGUF or other; "
            "wanted a class with from_single_file, such as SD3's or Flux's transformers"
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string("diffusers.class_name", str(config["_class_name"]))
    writer.add_string("quantmill.artifact", artifact)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types: Counter[str] = Counter()
    for name, tensor in sorted(dequantized_state(model).items()):
        if name in blocks:
            kind, data = blocks[name]
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            values = _floats(name, tensor)
            kind = "F16" if values.dtype == np.float16 else "F32"
            writer.add_tensor(name, values)
        types[kind] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(sorted(types.items()))


def _has_blocks(name: str, layer: QuantLayer) -> bool:
    """Whether a layer's codes go into blocks: not those of a patch embedding, or of rows that are no whole blocks."""
    spec = layer.spec
    if spec.low_rank:
        raise _refusal(
            name, f"a low-rank branch of rank {spec.low_rank}", "codes alone, as gguf-w4 has (passes.low_rank null)"
        )
    if spec.channel_scale:
        raise _refusal(name, "scaled input channels", "weights as they are, as gguf-w4 has (passes.scale null)")
    if spec.weight.is_float:
        raise _refusal(name, "e4m3 numbers", "int codes, as gguf-w8 has, or --format modelopt-fp8")
    if layer.kind is not nn.Linear:
        if layer.kernel_size != layer.stride:
            size = " x ".join(map(str, layer.kernel_size))
            raise _refusal(name, f"a convolution ({size})", "a transformer: blocks are Linear layers' alone")
        return False
    return layer.columns % BLOCK == 0


def _blocks(name: str, layer: QuantLayer) -> Blocks:
    """Return the type of a layer's blocks, and their bytes, shape (C_out, bytes of a row)."""
    weight = layer.spec.weight
    found = code_blocks(layer)
    if found is None:
        raise _refusal(name, f"groups of {weight.group_size} input channels", "whole blocks: weights.group_size=32")
    kind = fitting_type(found)
    if kind is None:
        raise _refusal(
            name, f"{weight.bits} bits with other zero points than {2 ** (weight.bits - 1)}", "weights.symmetric=true"
        )
    data = pack_blocks(found, kind)
    want = layer.weight.float().numpy()
    with np.errstate(invalid="ignore"):
        got = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
        error = float(np.linalg.norm(got - want)), _MOST_ROUNDED * float(np.linalg.norm(want))
    if not error[0] <= error[1]:
        raise _refusal(name, f"scales up to {found.scale.max():g} that float16 rounds too far", "others")
    return kind.name, data


def _floats(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return what is not in blocks: float16, and float32 of vectors and where float16 does not reach."""
    if not tensor.is_floating_point():
        raise ArtifactError(f"tensor {name}: got {tensor.dtype}, wanted floats, which is all that GGUF's loaders take")
    values: npt.NDArray[Any] = tensor.detach().float().numpy()
    fits = values.ndim > 1 and float(np.abs(values).max(initial=0.0)) <= _MOST_HALF
    return values.astype(np.float16) if fits else values


def _refusal(name: str, got: str, wanted: str) -> ArtifactError:
    return ArtifactError(f"layer {name}: got {got}, which GGUF's blocks can't hold; wanted {wanted}")
