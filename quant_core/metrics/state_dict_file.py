"""A user's file of weights: tensors by name, from safetensors or from torch's own format without pickled code."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_HEADER_BYTES = 8  # of a safetensors file: the length of its JSON, which follows


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    Raises
    ------
    RuntimeError, OSError, UnpicklingError, SafetensorError
        If it is neither, or holds anything but tensors.
    """
    with path.open("rb") as stream:
        is_safetensors = stream.read(_HEADER_BYTES + 1)[_HEADER_BYTES:] == b"{"
    weights = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise RuntimeError(f"got {type(weights).__name__}, wanted tensors by name")
    return weights
