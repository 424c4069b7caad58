"""Tiny random denoisers of the families that diffusers ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels.affine import quantize_affine
from quant_core.activation import ActivationQuantizer
from quant_core.layers import QUANTIZABLE, weight_matrix
from quant_core.model import build_quantized
from quant_core.qspec import ActivationMode, ActivationSpec, AttentionSpec, LayerSpec, QuantizationPlan, WeightSpec
from quant_core.ranges import QParams, qparams_from_range

EMOJI32 = Path(__file__).parents[2] / "examples" / "models" / "emoji32"


def unet() -> nn.Module:
    """Class-conditional image UNet with skip concatenations and attention."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=5,
    )


def text_unet() -> nn.Module:
    """Stable-Diffusion-like UNet with cross attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
    )


def sdxl_unet() -> nn.Module:
    """SDXL-like UNet: deep transformers, added text and time conditions."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def dit() -> nn.Module:
    """Class-conditional diffusion transformer with learned variance."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=6,
    )


def pixart() -> nn.Module:
    """PixArt: shared modulation, caption projection."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        cross_attention_dim=12,
        caption_channels=12,
        use_additional_conditions=True,
    )


def sd3() -> nn.Module:
    """Stable Diffusion 3: joint attention over text and image tokens."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    """Flux: packed latents, double and single stream blocks."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "unet": unet,
    "text_unet": text_unet,
    "sdxl_unet": sdxl_unet,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], nn.Module]:
    """Return a factory of tiny random denoisers in eval mode, by family; the same weights every time."""

    def make(family: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return FAMILIES[family]().eval().requires_grad_(False)

    return make


@pytest.fixture(params=list(FAMILIES))
def any_model(request: pytest.FixtureRequest, tiny_model: Callable[[str], nn.Module]) -> nn.Module:
    """Each family in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def emoji32() -> Path:
    """Return the folder of the shipped, trained UNet."""
    return EMOJI32


@pytest.fixture(scope="session")
def quantize_model() -> Callable[..., QuantizationPlan]:
    """Return what packs every Conv and Linear of a model in place: min-max weights, made-up input ranges."""

    def quantize(model: nn.Module, mode: ActivationMode = ActivationMode.PER_STEP, **weight: Any) -> QuantizationPlan:
        weight_spec = WeightSpec(**{"bits": 4} | weight)
        weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, QUANTIZABLE)}
        split = {n: (8, w.shape[1] - 8) for n, w in weights.items() if "up_blocks" in n and n.endswith("conv1")}
        activation = ActivationSpec(8, mode=mode)
        plan = QuantizationPlan(
            layers={n: LayerSpec(weight_spec, activation, split.get(n)) for n in weights},
            attentions={n: AttentionSpec(activation) for n, m in model.named_modules() if hasattr(m, "to_q")},
            timesteps=(900, 500, 100) if mode is ActivationMode.PER_STEP else (),
        )
        parts = build_quantized(model, plan)
        for name, layer in parts.layers.items():
            matrix, groups = weight_matrix(weights[name]), layer.group_index
            columns = [matrix[:, groups == g] for g in range(int(groups.max()) + 1)]
            low, high = (torch.stack([f(c, dim=1) for c in columns], dim=1) for f in (torch.amin, torch.amax))
            grid = qparams_from_range(low, high, weight_spec.bits, symmetric=weight_spec.symmetric)
            scale, zero_point = grid.scale[:, groups], grid.zero_point[:, groups]
            layer.set_codes(
                quantize_affine(matrix, scale, zero_point, 0, 2**weight_spec.bits - 1), grid.scale, grid.zero_point
            )
        for module in model.modules():
            if isinstance(module, ActivationQuantizer) and not module.spec.is_dynamic:
                steps = len(module.scale)
                module.set_qparams(QParams(torch.linspace(0.02, 0.05, steps), torch.linspace(100, 140, steps).round()))
        return plan

    return quantize
