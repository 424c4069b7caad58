"""The shapes of SDXL's UNet, without its weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

#: Arguments of `UNet2DConditionModel` for the UNet of stabilityai/stable-diffusion-xl-base-1.0.
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def meta_unet(shapes: dict[str, Any]) -> nn.Module:
    """Return a `UNet2DConditionModel` without memory for its weights, for inference."""
    with torch.device("meta"):
        model: Any = UNet2DConditionModel(**shapes)
    built: nn.Module = model.eval().requires_grad_(False)
    return built
