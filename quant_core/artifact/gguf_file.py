"""A release as a GGUF file: the codes of its Linear layers in blocks, everything else in float16 or float32.

Tensors have the names of the diffusers model, so that its `from_single_file` takes the file with the model's config; or
those of the authors' checkpoints (`quant_core.artifact.original_names`), by which ComfyUI-GGUF knows a model. Weights
only: what the release does to activations is not in it. `quant_core.artifact.gguf_blocks` says what is rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.gguf_blocks import BLOCK, CodeBlocks, code_blocks, fitting_type, join_blocks, pack_blocks
from quant_core.artifact.held_codes import has_plain_codes, refusal
from quant_core.artifact.original_names import OriginalTensor, naming_of, original_tensors, swap_halves
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer

GGUF_FILE = "diffusion_pytorch_model.gguf"
#: Says that tensors have diffusers' names, which tools for other names then refuse.
ARCHITECTURE = "diffusers"
HOLDER = "GGUF's blocks"
#: Most that float16 scales may change a layer's weights by, of their norm; ordinary ones do by 0.0005 at most.
_MOST_ROUNDED = 0.01
_MOST_HALF = 65504.0


def write_gguf(
    model: nn.Module, config: Mapping[str, Any], path: Path, *, artifact: str, original: bool = False
) -> dict[str, int]:
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
    original : bool
        Whether tensors have the names of the authors' checkpoints.

    Returns
    -------
    dict
        How many tensors have which of GGUF's types.

    Raises
    ------
    ArtifactError
        If no type of block holds some layer's codes; it names the layer and what would do. If diffusers does not load
        models of this class from single files, or their original names are not known.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    blocks = {f"{name}.weight": _blocks(name, layer) for name, layer in layers.items() if _has_blocks(name, layer)}
    state = dequantized_state(model)
    architecture, tensors = _named(model, str(config["_class_name"]), sorted(state), original=original)
    made = [(tensor.name, *_made(tensor, blocks, state)) for tensor in tensors]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("diffusers.class_name", str(config["_class_name"]))
    writer.add_string("quantmill.artifact", artifact)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, kind, values in made:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(sorted(Counter(kind for _, kind, _ in made).items()))


def _named(model: nn.Module, class_name: str, names: list[str], *, original: bool) -> tuple[str, list[OriginalTensor]]:
    """Return the architecture that a file states, and its tensors."""
    if original:
        naming = naming_of(class_name)
        return naming.architecture, original_tensors(naming, names)
    if not hasattr(model, "from_single_file"):
        raise ArtifactError(
            f"model: got {class_name}, of which diffusers reads no single files, GGUF or other; "
            "wanted a class with from_single_file, such as SD3's or Flux's transformers"
        )
    return ARCHITECTURE, [OriginalTensor(name, (name,)) for name in names]


def _has_blocks(name: str, layer: QuantLayer) -> bool:
    """Whether a layer's codes go into blocks: not those of a patch embedding, or of rows that are no whole blocks."""
    if not has_plain_codes(name, layer, HOLDER, "gguf-w4"):
        return False
    if layer.spec.weight.is_float:
        raise refusal(name, "e4m3 numbers", HOLDER, "int codes, as gguf-w8 has, or --format modelopt-fp8")
    return layer.columns % BLOCK == 0


def _blocks(name: str, layer: QuantLayer) -> CodeBlocks:
    """Return the blocks of a layer, which some type holds."""
    weight = layer.spec.weight
    found = code_blocks(layer)
    if found is None:
        raise refusal(
            name, f"groups of {weight.group_size} input channels", HOLDER, "whole blocks: weights.group_size=32"
        )
    if fitting_type(found) is None:
        other = f"{weight.bits} bits with other zero points than {2 ** (weight.bits - 1)}"
        raise refusal(name, other, HOLDER, "weights.symmetric=true")
    return found


def _made(
    tensor: OriginalTensor, blocks: Mapping[str, CodeBlocks], state: Mapping[str, Tensor]
) -> tuple[str, npt.NDArray[Any]]:
    """Return the type of a tensor of the file, and its values, or bytes of blocks if all of its sources have some."""
    want = torch.cat([state[source] for source in tensor.sources])
    want = swap_halves(want) if tensor.swapped else want
    parts = [blocks[source] for source in tensor.sources if source in blocks]
    if len(parts) < len(tensor.sources):
        values = _floats(tensor.name, want)
        return "F16" if values.dtype == np.float16 else "F32", values
    found = join_blocks(parts, swapped=tensor.swapped)
    kind = fitting_type(found)
    assert kind is not None, "the largest type holds what any smaller one does"
    data = pack_blocks(found, kind)
    with np.errstate(invalid="ignore"):
        off = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name]) - want.float().numpy()
    if not float(np.linalg.norm(off)) <= _MOST_ROUNDED * float(want.float().norm()):
        name = tensor.sources[0].removesuffix(".weight")
        raise refusal(
            name, f"scales up to {found.scale.max():g}, rounded to float16,", HOLDER, "larger or smaller ones"
        )
    return kind.name, data


def _floats(name: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return what is not in blocks: float16, and float32 of vectors and where float16 does not reach."""
    if not tensor.is_floating_point():
        raise ArtifactError(f"tensor {name}: got {tensor.dtype}, wanted floats, which is all that GGUF's loaders take")
    values: npt.NDArray[Any] = tensor.detach().float().numpy()
    fits = values.ndim > 1 and float(np.abs(values).max(initial=0.0)) <= _MOST_HALF
    return values.astype(np.float16) if fits else values
