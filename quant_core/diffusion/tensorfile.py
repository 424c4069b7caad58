"""Write safetensors files piece by piece, so that a file may be larger than memory; the same tensors give the same
bytes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quant_spec.errors import QuantizationError

_DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
_NAMES: dict[np.dtype[Any], str] = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (numpy's) of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.detach().cpu().numpy().dtype)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def create_tensor_file(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> dict[str, np.memmap[tuple[int, ...], np.dtype[Any]]]:
    """Create a safetensors file of zeros and return its tensors as writable memory maps.

    Parameters
    ----------
    metadata : mapping of str to str
        Goes into the header; must not depend on time or place.

    Raises
    ------
    QuantizationError
        If a dtype is not float32, float64, int64, int32 or bool, or a tensor is empty.
    OSError
        If the disk is full.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    # Largest elements first keeps every tensor aligned to its element size.
    for name, info in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if info.dtype not in _NAMES or not info.bytes:
            raise QuantizationError(
                f"tensor {name}: got {info.dtype} {info.shape}, wanted values of {', '.join(_DTYPES)}"
            )
        span = [offset, offset + info.bytes]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
        offset += info.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        # Reserved now, a full disk is an OSError; found out while writing to the map, it would kill the process.
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + offset)
    maps = {}
    for name, info in tensors.items():
        entry = header[name]
        start = 8 + len(text) + entry["data_offsets"][0]  # type: ignore[index]
        maps[name] = np.memmap(path, dtype=info.dtype, mode="r+", offset=start, shape=info.shape)
    return maps
