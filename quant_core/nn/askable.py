"""Modules of a packed model that others ask for their parameters' dtype and device.

Code of models reads `next(block.embedder.parameters()).dtype`, or `block.linear.weight.dtype`, to cast what it feeds.
Layers that are packed have no parameters, so that a block of nothing else has none: an empty one there answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: The name that the original's has, and one for layers whose weight is something else.
_NAME, _OTHER = "weight", "placeholder"


def keep_askable(model: nn.Module, packed: tuple[type[nn.Module], ...]) -> None:
    """Give layers of the `packed` classes an empty parameter each, where the module that they are in has none at all.

    It is in no state dict. Its dtype is the model's, or float32 in what diffusers keeps so.
    """
    known = next((value for value in model.parameters() if value.is_floating_point()), None)
    dtype = torch.float32 if known is None else known.dtype
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parent in model.named_modules():
        layers = [child for child in parent.children() if isinstance(child, packed)]
        if not layers or next(parent.parameters(), None) is not None:
            continue
        own = torch.float32 if wide & set(name.split(".")) else dtype
        for layer in layers:
            device = getattr(layer, "device", next(layer.buffers(), torch.empty(0)).device)
            empty = nn.Parameter(torch.empty(0, dtype=own, device=device), requires_grad=False)
            layer.register_parameter(_OTHER if hasattr(type(layer), _NAME) else _NAME, empty)
            layer.register_state_dict_post_hook(_leave_out)
            layer.register_load_state_dict_pre_hook(_do_not_miss)


def _leave_out(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in layer._parameters:
        state_dict.pop(prefix + name, None)


def _do_not_miss(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, value in layer._parameters.items():
        state_dict.setdefault(prefix + name, value)
