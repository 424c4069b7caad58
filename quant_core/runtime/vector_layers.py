"""Layers that read one vector of a sample, not its pixels or tokens: embeddings of the timestep, and modulations by it.

They multiply a few rows, where reading the weight takes the time: packed, it is read faster.
"""

from __future__ import annotations

from diffusers.models import normalization
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

_NORMS = normalization.__name__


def vector_layers(model: nn.Module) -> frozenset[str]:
    """Return the names of a diffusers model's layers that read vectors, as far as their places say so.

    These are what is inside a `TimestepEmbedding` or an adaptive norm of `diffusers.models.normalization`, and the
    projection of the embedding in a `ResnetBlock2D`.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, TimestepEmbedding) or type(module).__module__ == _NORMS:
            found.update(f"{name}.{inner}" for inner, _ in module.named_modules() if inner)
        elif isinstance(module, ResnetBlock2D):
            found.add(f"{name}.time_emb_proj")
    return frozenset(found)
