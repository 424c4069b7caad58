"""InceptionV3 up to its pooled features, for weights that a user has in a file; none are shipped or fetched.

Two sets of weights are about, with the same names and sizes of tensors: the TensorFlow network of the FID papers,
exported with 1008 classes, and torchvision's with 1000. They differ in their poolings: the former averages without
counting the padding, and its last block takes the maximum. They differ in their number of classes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.errors import DenoiserError
from quant_core.metrics.state_dict_file import read_state_dict

INCEPTION_PIXELS = 299
_FID_CLASSES = 1008


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, width_in: int, width: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, width, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """An Inception block: branches of convolutions side by side, and a pooled one; outputs are concatenated.

    Parameters
    ----------
    branches
        Each a chain of convolutions by name; a tuple in a chain is a fork whose ends are concatenated.
    pool
        "average", "average_inside" (padding does not count), "max", or "max_half" (stride 2, not convolved).
    """

    def __init__(
        self, convs: Mapping[str, _Conv], branches: Sequence[Sequence[str | tuple[str, ...]]], pool: str
    ) -> None:
        super().__init__()
        for name, conv in convs.items():
            self.add_module(name, conv)
        self.branches, self.pool = branches, pool

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the concatenated outputs of the branches."""
        outputs = [self._run(chain, x) for chain in self.branches]
        if self.pool == "max_half":
            outputs.append(F.max_pool2d(x, 3, 2))
        elif self.pool == "max":
            outputs.append(self.get_submodule("branch_pool")(F.max_pool2d(x, 3, 1, 1)))
        else:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.pool == "average")
            outputs.append(self.get_submodule("branch_pool")(pooled))
        return torch.cat(outputs, 1)

    def _run(self, chain: Sequence[str | tuple[str, ...]], x: Tensor) -> Tensor:
        for name in chain:
            if isinstance(name, tuple):
                x = torch.cat([self.get_submodule(end)(x) for end in name], 1)
            else:
                x = self.get_submodule(name)(x)
        return x


def _block_a(width: int, pooled: int, pool: str) -> _Mixed:
    convs = {
        "branch1x1": _Conv(width, 64, 1),
        "branch5x5_1": _Conv(width, 48, 1),
        "branch5x5_2": _Conv(48, 64, 5, padding=2),
        "branch3x3dbl_1": _Conv(width, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3, padding=1),
        "branch3x3dbl_3": _Conv(96, 96, 3, padding=1),
        "branch_pool": _Conv(width, pooled, 1),
    }
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    return _Mixed(convs, [["branch1x1"], ["branch5x5_1", "branch5x5_2"], double], pool)


def _block_b(width: int) -> _Mixed:
    convs = {
        "branch3x3": _Conv(width, 384, 3, 2),
        "branch3x3dbl_1": _Conv(width, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3, padding=1),
        "branch3x3dbl_3": _Conv(96, 96, 3, 2),
    }
    return _Mixed(convs, [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]], "max_half")


def _block_c(middle: int, pool: str) -> _Mixed:
    row: dict[str, Any] = {"kernel": (1, 7), "padding": (0, 3)}
    column: dict[str, Any] = {"kernel": (7, 1), "padding": (3, 0)}
    convs = {
        "branch1x1": _Conv(768, 192, 1),
        "branch7x7_1": _Conv(768, middle, 1),
        "branch7x7_2": _Conv(middle, middle, **row),
        "branch7x7_3": _Conv(middle, 192, **column),
        "branch7x7dbl_1": _Conv(768, middle, 1),
        "branch7x7dbl_2": _Conv(middle, middle, **column),
        "branch7x7dbl_3": _Conv(middle, middle, **row),
        "branch7x7dbl_4": _Conv(middle, middle, **column),
        "branch7x7dbl_5": _Conv(middle, 192, **row),
        "branch_pool": _Conv(768, 192, 1),
    }
    single, double = [f"branch7x7_{i}" for i in range(1, 4)], [f"branch7x7dbl_{i}" for i in range(1, 6)]
    return _Mixed(convs, [["branch1x1"], single, double], pool)


def _block_d() -> _Mixed:
    convs = {
        "branch3x3_1": _Conv(768, 192, 1),
        "branch3x3_2": _Conv(192, 320, 3, 2),
        "branch7x7x3_1": _Conv(768, 192, 1),
        "branch7x7x3_2": _Conv(192, 192, (1, 7), padding=(0, 3)),
        "branch7x7x3_3": _Conv(192, 192, (7, 1), padding=(3, 0)),
        "branch7x7x3_4": _Conv(192, 192, 3, 2),
    }
    return _Mixed(convs, [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)]], "max_half")


def _block_e(width: int, pool: str) -> _Mixed:
    row: dict[str, Any] = {"kernel": (1, 3), "padding": (0, 1)}
    column: dict[str, Any] = {"kernel": (3, 1), "padding": (1, 0)}
    convs = {
        "branch1x1": _Conv(width, 320, 1),
        "branch3x3_1": _Conv(width, 384, 1),
        "branch3x3_2a": _Conv(384, 384, **row),
        "branch3x3_2b": _Conv(384, 384, **column),
        "branch3x3dbl_1": _Conv(width, 448, 1),
        "branch3x3dbl_2": _Conv(448, 384, 3, padding=1),
        "branch3x3dbl_3a": _Conv(384, 384, **row),
        "branch3x3dbl_3b": _Conv(384, 384, **column),
        "branch_pool": _Conv(width, 192, 1),
    }
    single: list[str | tuple[str, ...]] = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    double: list[str | tuple[str, ...]] = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return _Mixed(convs, [["branch1x1"], single, double], pool)


class InceptionV3(nn.Module):
    """InceptionV3's 2048 pooled features of images (B, 3, 299, 299) in [-1, 1].

    Parameters
    ----------
    is_fid : bool
        Pool as the network of the FID papers does.
    """

    def __init__(self, *, is_fid: bool) -> None:
        super().__init__()
        average = "average_inside" if is_fid else "average"
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _block_a(192, 32, average)
        self.Mixed_5c = _block_a(256, 64, average)
        self.Mixed_5d = _block_a(288, 64, average)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(128, average)
        self.Mixed_6c = _block_c(160, average)
        self.Mixed_6d = _block_c(160, average)
        self.Mixed_6e = _block_c(192, average)
        self.Mixed_7a = _block_d()
        self.Mixed_7b = _block_e(1280, average)
        self.Mixed_7c = _block_e(2048, "max" if is_fid else average)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, 299, 299) in [-1, 1] to features (B, 2048)."""
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x)
        return x.mean(dim=(2, 3))


class _Scripted(nn.Module):
    """A TorchScript network, called with the arguments that its forward takes."""

    def __init__(self, network: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.network = network
        self.takes_bytes = "return_features" in str(getattr(network.forward, "schema", ""))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features."""
        features: Tensor = self.network((x + 1) * 127.5, return_features=True) if self.takes_bytes else self.network(x)
        return features


def load_inception(path: Path) -> tuple[nn.Module, str]:
    """Load weights by what the file is, and return the network with its name in a metric's protocol.

    Raises
    ------
    DenoiserError
        If tensors are missing, left over, or of other shapes.
    """
    if _is_torchscript(path):
        return _Scripted(torch.jit.load(str(path), map_location="cpu").eval()), "inception-v3-torchscript"
    weights = read_state_dict(path)
    is_fid = "fc.weight" in weights and len(weights["fc.weight"]) == _FID_CLASSES
    network = InceptionV3(is_fid=is_fid)
    wanted = {name: tensor for name, tensor in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
    missing = sorted(set(network.state_dict()) - set(wanted))
    # old exports lack the batch counters, which evaluation does not read
    if missing := [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise DenoiserError(f"extractor {path}: got no {missing[0]} (and {len(missing) - 1} more), wanted InceptionV3")
    network.load_state_dict(network.state_dict() | wanted, strict=True)
    return network.eval().requires_grad_(False), "inception-v3-fid" if is_fid else "inception-v3-torchvision"


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
