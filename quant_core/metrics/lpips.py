"""Learned perceptual image patch similarity (LPIPS, Zhang et al., arXiv:1801.03924), by weights of the user's.

Features of a network trained on ImageNet, normalized at each position, are compared layer by layer; learned weights of
channels, the heads, add up what differs. The heads come with torchmetrics. The network's weights do not: a user gives
them as a file. torchmetrics itself takes no file: it has torchvision build the network and download its weights. So the
two networks are built here, by the names that torchvision's files have.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quant_core.errors import DenoiserError
from quant_core.metrics.state_dict_file import read_state_dict

# Mean and standard deviation of ImageNet's pixels, in [-1, 1] (torchmetrics 1.9.0, functional/image/lpips.py).
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-8
_BATCH = 32  # images; VGG16 keeps 30 MiB of maps for each of 512 x 512 pixels


def _alexnet() -> tuple[list[nn.Module], tuple[int, ...]]:
    """Return AlexNet's `features` as torchvision has them, and where they are cut: behind each ReLU."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return layers, (0, 2, 5, 8, 10, 12)


def _vgg16() -> tuple[list[nn.Module], tuple[int, ...]]:
    """Return VGG16's `features` as torchvision has them, and where they are cut: before each pooling."""
    layers: list[nn.Module] = []
    cuts, width_in = [0], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
            width_in = width
        cuts.append(len(layers))
        layers.append(nn.MaxPool2d(2))
    return layers[:-1], tuple(cuts)


#: Name, what builds the network, and the least side of an image in pixels that leaves something behind every pooling.
_NETWORKS = {"alex": (_alexnet, 31), "vgg": (_vgg16, 16)}


class Lpips(nn.Module):
    """LPIPS with the network that a file has the weights of; nothing is downloaded.

    Parameters
    ----------
    path : Path
        State dict of torchvision's `alexnet` or `vgg16`, as safetensors or in torch's own format without pickled code;
        layers behind the features may be missing. Which of the two it is follows from its content.

    Raises
    ------
    DenoiserError
        If it is neither.
    """

    shift: Tensor  # (1, 3, 1, 1), as is `scale`
    scale: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            weights = read_state_dict(path)
        except (RuntimeError, OSError, pickle.UnpicklingError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise DenoiserError(f"evaluation.lpips: got a file that does not load ({reason}), {_WANTED}") from error
        self.network = _which(weights)
        build, self.least_pixels = _NETWORKS[self.network]
        layers, cuts = build()
        features = nn.Sequential(*layers)
        features.load_state_dict(
            {name.removeprefix("features."): value for name, value in weights.items() if name in _names(features)}
        )
        self.slices = nn.ModuleList(features[start:stop] for start, stop in pairwise(cuts))
        self.heads = nn.ParameterList(_heads(self.network))  # each (1, C, 1, 1)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, reference: Tensor, quantized: Tensor) -> Tensor:
        """Return the distance of each pair of images, 0 for equal ones.

        Parameters
        ----------
        reference, quantized : Tensor, shape (n, 3, H, W), dtype float32, in [-1, 1]

        Returns
        -------
        Tensor, shape (n,), dtype float32
        """
        total = torch.zeros(len(reference), device=reference.device)
        for head, one, other in zip(self.heads, self._maps(reference), self._maps(quantized), strict=True):
            total += (head * (one - other).square()).sum(dim=1).mean(dim=(1, 2))
        return total

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the maps behind each slice, of unit length at each position."""
        x = (images - self.shift) / self.scale
        for layers in self.slices:
            x = layers(x)
            yield x / (_EPSILON + x.square().sum(dim=1, keepdim=True)).sqrt()


_WANTED = "wanted the state dict of torchvision's alexnet or vgg16"


def _which(weights: Mapping[str, Tensor]) -> str:
    """Return which network a state dict is of."""
    for name, (build, _) in _NETWORKS.items():
        features = nn.Sequential(*build()[0])
        ours = {f"features.{key}": value.shape for key, value in features.state_dict().items()}
        if all(key in weights and weights[key].shape == shape for key, shape in ours.items()):
            return name
    first = next(iter(weights.items()), None)
    got = "no tensor" if first is None else f"{first[0]} {tuple(first[1].shape)} and {len(weights) - 1} more"
    raise DenoiserError(f"evaluation.lpips: got {got}, {_WANTED}")


def _names(features: nn.Sequential) -> set[str]:
    return {f"features.{name}" for name in features.state_dict()}


def _heads(network: str) -> list[Tensor]:
    """Return the learned weights of channels of each slice, shape (1, C, 1, 1), as torchmetrics ships them."""
    import torchmetrics.functional.image as shipped

    file = Path(shipped.__file__).parent / "lpips_models" / f"{network}.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return [weights[f"lin{place}.model.1.weight"] for place in range(len(weights))]


@torch.no_grad()
def lpips_per_sample(reference: Tensor, quantized: Tensor, lpips: Lpips, *, device: str = "cpu") -> list[float]:
    """Return the LPIPS of each pair of images.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, 3, H, W), dtype float32, in [-1, 1]
    lpips : Lpips
        On `device`, where it is computed in full float32.

    Raises
    ------
    DenoiserError
        If images are too small for the network.
    """
    side = min(reference.shape[2:])
    if side < lpips.least_pixels:
        wanted = f"wanted at least {lpips.least_pixels} with {lpips.network}"
        raise DenoiserError(f"evaluation.lpips: got images with a side of {side} pixels, {wanted}")
    found: list[float] = []
    with torch.backends.cudnn.flags(enabled=True, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False):
        for one, other in zip(reference.split(_BATCH), quantized.split(_BATCH), strict=True):
            found += lpips(one.to(device), other.to(device)).tolist()
    return found
