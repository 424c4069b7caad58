"""Bytes of a packed weights file, tensor by tensor, before there is one.

A safetensors file is 8 bytes, a JSON header with an entry for each tensor, and the tensors' bytes. So its size is a sum
over layers. What an entry takes depends a little on the tensor's place in the file, by the digits of its two offsets;
here all have as many digits as the largest file's, so that a sum is a few bytes for each tensor too much, never too
little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor, nn

from kernels.packing import packed_size
from quant_core.artifact.compact import packed_parts
from quant_spec.formats import LayerSpec

_DTYPES = {
    **{"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"},
    **{"torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8"},
    "torch.bool": "BOOL",
}
#: What a file has beside tensors and their entries: length, metadata, braces, and at most 7 bytes of padding.
FRAME_BYTES = 8 + len('{"__metadata__":{"format":"pt"}}') + 7


def offset_digits(parameters: int) -> int:
    """Return the digits of the largest offset in the packed file of a model: about a byte for each parameter."""
    return len(str(parameters * 5 // 4))


def tensor_bytes(name: str, tensor: Tensor, digits: int, shape: tuple[int, ...] | None = None) -> int:
    """Return what a tensor takes in the file; `shape` if it is stored in another."""
    stored = tuple(tensor.shape) if shape is None else shape
    size = tensor.element_size()
    for extent in stored:
        size *= extent
    offset = 10**digits - 1
    entry = {"dtype": _DTYPES[str(tensor.dtype)], "shape": list(stored), "data_offsets": [offset, offset]}
    return size + len(json.dumps({name: entry}, separators=(",", ":"))) - 1  # a comma for the two braces


def layer_bytes(name: str, spec: LayerSpec, tensors: Mapping[str, Tensor], digits: int) -> int:
    """Return what a quantized layer takes in the file; `tensors` by their names there, grids unpacked."""
    total = 0
    for key, tensor in tensors.items():
        shape, bits = None, packed_parts(spec.weight).get(key.removeprefix(f"{name}."))
        if bits is not None:
            shape = (tensor.shape[0], min(packed_size(tensor.shape[1], bits), tensor.shape[1]))
        total += tensor_bytes(key, tensor, digits, shape)
    return total


def kept_bytes(model: nn.Module, name: str, digits: int) -> int:
    """Return what a layer takes that is not quantized."""
    module = model.get_submodule(name)
    return sum(tensor_bytes(f"{name}.{key}", tensor, digits) for key, tensor in module.state_dict().items())


def rest_bytes(model: nn.Module, quantized: set[str], digits: int) -> int:
    """Return what all else takes, and the file's frame: tensors of no layer that is quantized, replaced or dropped."""
    total = FRAME_BYTES
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in quantized:
            total += tensor_bytes(key, tensor, digits)
    return total
