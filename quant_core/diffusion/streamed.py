"""A large denoiser whose weights stay in their files: each is read when its layer is called, in float32, and let go.

The files are mapped into memory, and the pages of a weight are given back to the system once it is read. So a process
holds one layer's weight at a time in float32, whatever the checkpoint's size, and computes what it would compute with
all of them in memory, bit for bit. Small weights, biases and norms are held in float32.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

#: Weight files of more bytes than this are streamed.
STREAMED_BYTES = 1 << 30
#: Weights of so many numbers, or fewer, are held.
_SMALL = 1 << 16
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a safetensors file that is mapped into memory."""

    mapped: mmap.mmap
    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, device: torch.device) -> Tensor:
        """Return a copy in float32 on a device; the pages that it was read from are given back."""
        count = self.bytes // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, device=device)
        view = torch.frombuffer(self.mapped, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)
        made = view.to(device=device, dtype=torch.float32, copy=True)
        del view
        first = self.offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapped.madvise(mmap.MADV_DONTNEED, first, self.offset + self.bytes - first)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredTensor:
        """Copies of a model share its files."""
        return self


def stored_tensors(home: Path) -> dict[str, StoredTensor]:
    """Return the floating-point tensors of a folder's safetensors files, by name, none of them read."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(home.glob("*.safetensors")):
        with safe_open(path, framework="pt"):
            pass  # refuses what is no safetensors file, or is truncated
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapped[:8], "little")
        for name, entry in json.loads(mapped[8:start]).items():
            if name != "__metadata__" and entry["dtype"] in _DTYPES:
                first, last = entry["data_offsets"]
                shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
                found[name] = StoredTensor(mapped, start + first, last - first, shape, dtype)
    return found


def is_large(home: Path) -> bool:
    """Whether a denoiser's weight files are to be streamed."""
    return sum(path.stat().st_size for path in home.glob("*.safetensors")) > STREAMED_BYTES


def is_streamed(model: nn.Module) -> bool:
    """Whether a model's large weights are left in their files."""
    return any(isinstance(module, _Streamed) for module in model.modules())


class _Streamed(nn.Module):
    """Mixed into the class of a module whose `weight` is read from its file whenever it is asked for."""

    _stored: StoredTensor

    @property
    def weight(self) -> nn.Parameter:
        """The weight in float32, a new copy each time."""
        placeholder = self._parameters["weight"]
        assert placeholder is not None
        return nn.Parameter(self._stored.read(placeholder.device), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        placeholder = self._parameters.pop("weight")
        super()._apply(fn, recurse)
        assert placeholder is not None
        self._parameters["weight"] = _placeholder(placeholder.shape, fn(placeholder.new_zeros(())))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight.detach()


def _placeholder(shape: tuple[int, ...], zero: Tensor) -> nn.Parameter:
    """Return a parameter that has a weight's shape, dtype and device, and the memory of one number."""
    return nn.Parameter(zero.expand(shape), requires_grad=False)


def stream_weights(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Fill a model that was built on the meta device: large weights are left in their files, all else is read.

    Parameters
    ----------
    model : nn.Module
        Its state dict has exactly the names of `stored`.
    """
    for name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            source = stored[f"{name}.{leaf}".lstrip(".")]
            if leaf == "weight" and parameter.numel() > _SMALL:
                cls = type(module)
                module.__class__ = type(cls.__name__, (_Streamed, cls), {"__module__": cls.__module__})
                module._stored = source
                module._parameters["weight"] = _placeholder(tuple(parameter.shape), torch.zeros(()))
            else:
                module._parameters[leaf] = nn.Parameter(source.read(torch.device("cpu")), requires_grad=False)
        for leaf, buffer in list(module._buffers.items()):
            key = f"{name}.{leaf}".lstrip(".")
            if buffer is not None and key in stored:
                module._buffers[leaf] = stored[key].read(torch.device("cpu")).to(buffer.dtype)
