"""The low-rank branches of layers, as one task chooses them and another uses them.

Stored as safetensors bytes; equal values give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor

_DOWN, _UP = ".low_rank_down", ".low_rank_up"


@dataclass(frozen=True, slots=True)
class LowRankBranch:
    """Two matrices whose product stands for a part of a layer's weight matrix (C_out, K).

    Attributes
    ----------
    down : Tensor, shape (R, K), dtype bfloat16
        Multiplies the layer's input as it is, before its channels are scaled.
    up : Tensor, shape (C_out, R), dtype bfloat16
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Rank of the branch."""
        return len(self.down)

    def matrix(self) -> Tensor:
        """Return up @ down, shape (C_out, K), dtype float32."""
        return self.up.float() @ self.down.float()


def branches_to_bytes(branches: Mapping[str, LowRankBranch]) -> bytes:
    """Serialise branches by layer name."""
    tensors = {name + _DOWN: branch.down for name, branch in branches.items()}
    tensors |= {name + _UP: branch.up for name, branch in branches.items()}
    return save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)})


def branches_from_bytes(parts: Sequence[bytes]) -> dict[str, LowRankBranch]:
    """Read and join what `branches_to_bytes` wrote."""
    found = {name: tensor for part in parts for name, tensor in load(part).items()}
    names = [name.removesuffix(_DOWN) for name in found if name.endswith(_DOWN)]
    return {name: LowRankBranch(found[name + _DOWN], found[name + _UP]) for name in names}
