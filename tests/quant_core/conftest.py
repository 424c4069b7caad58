"""Tiny random denoisers of the families that diffusers ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kernels.affine import quantize_affine
from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories
from quant_core.diffusion.conditioning import TEXT_TOKENS, conditioning_fields
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.fit.layer_rounding import weight_grid
from quant_core.fit.rounding import UnitRanges
from quant_core.inspect.inspection import trace_model
from quant_core.inspect.units import find_units
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QUANTIZABLE, weight_matrix
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, UnitFormat, WeightSpec
from quant_spec.ranges import RangeSpec
from quant_spec.sampler import Sampler

MODELS = Path(__file__).parents[2] / "examples" / "models"
EMOJI32 = MODELS / "emoji32"
DIGITS = MODELS / "digits"
DIFFUSION = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
TOKENS = 5


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
def quantize_model() -> Callable[..., ModelFormat]:
    """Return what packs every Conv and Linear of a model in place: min-max weights, made-up input ranges."""

    def quantize(model: nn.Module, mode: ActivationMode = ActivationMode.PER_STEP, **weight: Any) -> ModelFormat:
        weight_spec = WeightSpec(**{"bits": 4} | weight)
        weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, QUANTIZABLE)}
        split = {n: (8, w.shape[1] - 8) for n, w in weights.items() if "up_blocks" in n and n.endswith("conv1")}
        activation = ActivationSpec(8, mode=mode)
        model_format = ModelFormat(
            layers={n: LayerSpec(weight_spec, activation, split.get(n)) for n in weights},
            attentions={n: AttentionSpec(activation) for n, m in model.named_modules() if hasattr(m, "to_q")},
            timesteps=(900, 500, 100) if mode is ActivationMode.PER_STEP else (),
        )
        parts = build_quantized(model, model_format)
        for name, layer in parts.layers.items():
            matrix, groups = weight_matrix(weights[name]), layer.group_index
            columns = [matrix[:, groups == g] for g in range(int(groups.max()) + 1)]
            low, high = (torch.stack([f(c, dim=1) for c in columns], dim=1) for f in (torch.amin, torch.amax))
            grid = qparams_from_range(low, high, weight_spec.bits, symmetric=weight_spec.symmetric)
            if weight_spec.is_multiplied:
                grid = weight_grid(matrix, layer.spec, groups, RangeSpec())
            scale, zero_point = grid.scale[:, groups], grid.zero_point[:, groups]
            codes = quantize_affine(matrix, scale, zero_point, 0, 2**weight_spec.bits - 1)
            layer.set_codes(codes, grid.scale, grid.zero_point, grid.multiplier)
        for module in model.modules():
            if isinstance(module, ActivationQuantizer) and not module.spec.is_dynamic:
                steps = len(module.scale)
                module.set_qparams(QParams(torch.linspace(0.02, 0.05, steps), torch.linspace(100, 140, steps).round()))
        return model_format

    return quantize


@pytest.fixture(scope="session")
def calibrated(
    tiny_model: Callable[[str], nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Denoiser, CalibrationSet]]:
    """Return a factory of a fresh denoiser, a family's or the digits model, and its calibration set of 3 steps."""
    shards: dict[tuple[str, int], Path] = {}

    def make(family: str, seeds: int = 4) -> tuple[Denoiser, CalibrationSet]:
        folder = tmp_path_factory.mktemp(family)
        denoiser = _denoiser(family, tiny_model, folder)
        if (family, seeds) not in shards:
            scale = 0.001 if family == "flux" else 1.0
            spec = RecordSpec(Sampler(num_inference_steps=3, timestep_scale=scale), batch_size=seeds)
            record_trajectories(denoiser, range(seeds), spec, folder / "shard")
            shards[family, seeds] = folder / "shard"
        return denoiser, CalibrationSet([shards[family, seeds]])

    return make


def _denoiser(family: str, tiny_model: Callable[[str], nn.Module], folder: Path) -> Denoiser:
    if family == "digits":
        return load_denoiser(DIGITS)
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(5)
    positions = {"img_ids": (16, 3), "txt_ids": (TOKENS, 3)}
    rows = {
        key: torch.randn(
            positions.get(key) or (2, *(TOKENS if size == TEXT_TOKENS else size for size in field.shape)),
            generator=generator,
        )
        for key, field in conditioning_fields(model).items()
        if field.classes is None
    }
    file = folder / "conditioning.safetensors"
    if rows:
        save_file(rows, file)
    return Denoiser(model, {}, FLOW if family in ("sd3", "flux") else DIFFUSION, file if rows else None)


@pytest.fixture(scope="session")
def unit_formats() -> Callable[..., list[tuple[UnitFormat, UnitRanges]]]:
    """Return what chooses formats and ranges of every unit of a denoiser, in the order in which they run."""

    def choose(
        denoiser: Denoiser,
        bits: int = 4,
        activation: ActivationSpec | None = ActivationSpec(8),  # noqa: B008 - frozen
        weight_range: str = "minmax",
        activation_range: str = "minmax",
        **weight: Any,
    ) -> list[tuple[UnitFormat, UnitRanges]]:
        trace = trace_model(denoiser)
        units = []
        for unit in find_units(denoiser.model, trace).units:
            layers = {n: LayerSpec(WeightSpec(bits, **weight), activation, trace.layers[n].split) for n in unit.layers}
            attentions = {} if activation is None else {name: AttentionSpec(activation) for name in unit.attentions}
            ranges = UnitRanges(
                {name: RangeSpec(weight_range) for name in layers},
                {name: RangeSpec(activation_range) for name in (*layers, *attentions)} if activation else {},
            )
            units.append((UnitFormat(unit.name, layers, attentions), ranges))
        return units

    return choose
