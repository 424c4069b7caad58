"""Networks of torchvision by their layers, with random weights: what a user's file for the LPIPS holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def alexnet() -> nn.Sequential:
    """Return `torchvision.models.alexnet().features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def vgg16() -> nn.Sequential:
    """Return `torchvision.models.vgg16().features`."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(before, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers)


BACKBONES = {"alex": alexnet, "vgg": vgg16}


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """Return a state dict as torchvision's files have it, with a layer behind the features."""
    torch.manual_seed(0)
    features = BACKBONES[name]()
    found = {f"features.{key}": value for key, value in features.state_dict().items()}
    return {**found, "classifier.1.weight": torch.zeros(2, 2)}


def save_weights(path: Path, name: str = "alex") -> Path:
    """Save such a state dict in torch's own format."""
    torch.save(weights_of(name), path)
    return path
