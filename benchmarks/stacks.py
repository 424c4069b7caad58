"""The denoisers that `benchmarks.gpu_step` times, by their shapes: SDXL's UNet, DiT-XL, some blocks of SD3 and Flux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from benchmarks.sdxl import SDXL, meta_unet

#: Arguments of `DiTTransformer2DModel` for facebook/DiT-XL-2-512.
DIT_XL: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 64, "patch_size": 2, "num_embeds_ada_norm": 1000,
}  # fmt: skip
#: Of `SD3Transformer2DModel` for stabilityai/stable-diffusion-3-medium, but for the number of its blocks, 24 there.
SD3: dict[str, Any] = {
    "num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 8, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "sample_size": 128, "patch_size": 2,
    "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192,
}  # fmt: skip
#: Of `FluxTransformer2DModel` for black-forest-labs/FLUX.1-dev, but for the number of its blocks: 19 and 38 there.
FLUX: dict[str, Any] = {"num_layers": 3, "num_single_layers": 6, "guidance_embeds": True}


@dataclass(frozen=True, slots=True)
class Stack:
    """A denoiser by its shapes.

    Attributes
    ----------
    shapes : dict
        Arguments of its class.
    build : callable
        Returns it on the meta device, of such arguments.
    floats : tuple of str
        Layers that are not packed: those that take in and give out samples.
    told : callable
        Returns what it is called with, of `shapes`, a batch size, latents' side and a device; timesteps as a tensor.
    """

    shapes: dict[str, Any]
    build: Callable[[dict[str, Any]], nn.Module]
    floats: tuple[str, ...]
    told: Callable[[dict[str, Any], int, int, str], dict[str, Any]]


def _noise(device: str, *shape: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16)


def _meta(kind: type[nn.Module], shapes: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model = kind(**shapes)
    return model.eval().requires_grad_(False)


def _tell_unet(shapes: dict[str, Any], batch: int, latents: int, device: str) -> dict[str, Any]:
    pooled = shapes["projection_class_embeddings_input_dim"] - 6 * shapes["addition_time_embed_dim"]
    image = _noise(device, batch, shapes["in_channels"], latents, latents)
    ids = torch.zeros(batch, 6, device=device, dtype=torch.bfloat16)
    return {
        "sample": image.contiguous(memory_format=torch.channels_last),
        "timestep": torch.tensor(0.0, device=device),
        "encoder_hidden_states": _noise(device, batch, 77, shapes["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": _noise(device, batch, pooled), "time_ids": ids},
    }


def _tell_dit(shapes: dict[str, Any], batch: int, latents: int, device: str) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, batch, shapes["in_channels"], latents, latents),
        "timestep": torch.zeros(batch, device=device),
        "class_labels": torch.arange(batch, device=device) % shapes["num_embeds_ada_norm"],
    }


def _tell_sd3(shapes: dict[str, Any], batch: int, latents: int, device: str) -> dict[str, Any]:
    """Two encoders give 77 tokens of text each."""
    return {
        "hidden_states": _noise(device, batch, shapes["in_channels"], latents, latents),
        "timestep": torch.zeros(batch, device=device),
        "encoder_hidden_states": _noise(device, batch, 154, shapes["joint_attention_dim"]),
        "pooled_projections": _noise(device, batch, shapes["pooled_projection_dim"]),
    }


def _tell_flux(shapes: dict[str, Any], batch: int, latents: int, device: str) -> dict[str, Any]:
    """Latents are read in squares of 2 x 2; 512 tokens of text."""
    side, text = latents // 2, 512
    image_ids = torch.zeros(side * side, 3, device=device)
    image_ids[:, 1] = torch.arange(side, device=device).repeat_interleave(side)
    image_ids[:, 2] = torch.arange(side, device=device).repeat(side)
    return {
        "hidden_states": _noise(device, batch, side * side, shapes.get("in_channels", 64)),
        "timestep": torch.zeros(batch, device=device),
        "encoder_hidden_states": _noise(device, batch, text, shapes.get("joint_attention_dim", 4096)),
        "pooled_projections": _noise(device, batch, shapes.get("pooled_projection_dim", 768)),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=torch.bfloat16),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(text, 3, device=device),
    }


STACKS = {
    "sdxl": Stack(SDXL, meta_unet, ("conv_in", "conv_out"), _tell_unet),
    "dit-xl": Stack(
        DIT_XL,
        lambda shapes: _meta(DiTTransformer2DModel, shapes),
        ("pos_embed.proj", "proj_out_1", "proj_out_2"),
        _tell_dit,
    ),
    "sd3": Stack(
        SD3,
        lambda shapes: _meta(SD3Transformer2DModel, shapes),
        ("pos_embed.proj", "context_embedder", "proj_out"),
        _tell_sd3,
    ),
    "flux": Stack(
        FLUX,
        lambda shapes: _meta(FluxTransformer2DModel, shapes),
        ("x_embedder", "context_embedder", "proj_out"),
        _tell_flux,
    ),
}
