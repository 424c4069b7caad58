"""The dtype that a model computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating parameter, or what that is cast to when it computes.

    Under diffusers' layerwise casting, layers hold their weights in a narrower dtype while they don't run. A model
    without such parameters computes in float32.
    """
    for module in model.modules():
        held = next((each.dtype for each in module.parameters(recurse=False) if each.is_floating_point()), None)
        if held is not None:
            hooks: Any = getattr(module, "_diffusers_hook", None)
            casting = None if hooks is None else hooks.get_hook("layerwise_casting")
            found: torch.dtype = held if casting is None else casting.compute_dtype
            return found
    return torch.float32
