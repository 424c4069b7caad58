"""GGUF files: every code as it is in the smallest type of block, and what no block holds is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from torch import nn

from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.gguf_blocks import CodeBlocks, fitting_type, pack_blocks
from quant_core.artifact.gguf_file import write_gguf
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import build_quantized
from quant_spec.enums import Granularity
from quant_spec.formats import LayerSpec, ModelFormat, WeightSpec
from tests.quant_core.multiplied import multiplied, random_grid

GROUPS = {"granularity": Granularity.PER_GROUP, "group_size": 32}
Quantize = Callable[..., Any]


def sd3() -> nn.Module:
    """A joint transformer whose rows are whole blocks, but for those of its text's embedding."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=8,
    )


def flux() -> nn.Module:
    """Double and single stream blocks."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def write(model: nn.Module, folder: Path) -> tuple[dict[str, int], Path]:
    """Write a file, and the config that a loader takes with it; return the counts of types and the file."""
    folder.mkdir(exist_ok=True)
    model.save_config(folder)
    return write_gguf(model, model.config, folder / "model.gguf", artifact="0" * 64), folder / "model.gguf"


def load(model: Any, file: Path) -> nn.Module:
    """Load a file as diffusers' users do."""
    told = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    loader: Any = type(model)
    return loader.from_single_file(
        str(file), config=str(file.parent), quantization_config=told, torch_dtype=torch.float32
    )


def quantized(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


# Steps of the grid that a weight may be off by: what float16 does to 15 scales, and to zero points times a scale.
@pytest.mark.parametrize(
    ("weight", "kind", "most"),
    [
        ({"bits": 8, "symmetric": True}, "Q8_0", 0.07),
        ({"bits": 8, "symmetric": True, **GROUPS}, "Q8_0", 0.0),
        ({"bits": 6, "symmetric": True}, "Q8_0", 0.02),
        ({"bits": 5, "symmetric": True, **GROUPS}, "Q5_0", 0.0),
        ({"bits": 5, **GROUPS}, "Q5_1", 0.02),
        ({"bits": 4, "symmetric": True, **GROUPS}, "Q4_0", 0.0),
        ({"bits": 4, **GROUPS}, "Q4_1", 0.01),
        ({"bits": 4, **GROUPS, "group_size": 64}, "Q4_1", 0.01),
        ({"bits": 4, **GROUPS, "group_scale": "integer"}, "Q4_1", 0.02),
        ({"bits": 2}, "Q4_0", 0.002),
    ],
)
@pytest.mark.parametrize("make", [sd3, flux])
def test_diffusers_loads_what_the_codes_stand_for(
    make: Callable[[], nn.Module],
    weight: dict[str, Any],
    kind: str,
    most: float,
    quantize_model: Quantize,
    tmp_path: Path,
) -> None:
    model = make()
    quantize_model(model, **weight)
    types, file = write(model, tmp_path)
    layers = {name: layer for name, layer in quantized(model).items() if layer.kind is nn.Linear}
    blocks = {name: layer for name, layer in layers.items() if layer.columns % 32 == 0}
    assert len(blocks) > 15
    assert types.pop(kind) == len(blocks)
    assert types.keys() <= {"F16", "F32"}
    loaded = load(model, file)
    assert {name for name, module in loaded.named_modules() if isinstance(module, GGUFLinear)} == set(blocks)
    wanted = dequantized_state(model)
    for name, value in loaded.state_dict().items():
        if name.removesuffix(".weight") not in blocks:
            torch.testing.assert_close(value, wanted[name], rtol=2**-11, atol=1e-7)
            continue
        layer = layers[name.removesuffix(".weight")]
        reader = gguf.quants.dequantize(value.as_tensor().numpy(), gguf.GGMLQuantizationType[kind])
        step = layer.steps[:, layer.group_index] if layer.steps.shape[1] > 1 else layer.steps
        error = (torch.from_numpy(reader) - wanted[name]).abs() / step
        assert float(error.max()) <= most, name
        in_half = dequantize_gguf_tensor(value).float()  # diffusers multiplies in float16
        torch.testing.assert_close(in_half, wanted[name], rtol=2e-3, atol=float(step.max()) * 2e-2)


def test_a_loaded_model_predicts_what_the_release_does(quantize_model: Quantize, tmp_path: Path) -> None:
    model: Any = sd3()
    quantize_model(model, bits=4, **GROUPS)
    loaded = load(model, write(model, tmp_path)[1])
    generator = torch.Generator().manual_seed(0)
    told = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
    }
    plain = type(model).from_config(model.config)
    plain.load_state_dict(dequantized_state(model))
    with torch.no_grad():
        want, got = plain.eval()(**told).sample, loaded(**told).sample
    assert float((got - want).norm() / want.norm()) < 2e-3


def test_the_file_names_its_release_and_is_deterministic(quantize_model: Quantize, tmp_path: Path) -> None:
    model = sd3()
    quantize_model(model, bits=8, symmetric=True)
    (_, one), (_, other) = write(model, tmp_path / "one"), write(model, tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
    reader = gguf.GGUFReader(one)
    told = {name: reader.fields[name].contents() for name in ("general.architecture", "quantmill.artifact")}
    assert told == {"general.architecture": "diffusers", "quantmill.artifact": "0" * 64}


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_are_as_ggml_reads_them(bits: int, symmetric: bool) -> None:
    generator = np.random.default_rng(bits)
    codes = generator.integers(0, 2**bits, (3, 2, 32), dtype=np.int32)
    codes[0, 0, :2] = 0, 2**bits - 1
    zero = np.full((3, 2), 2 ** (bits - 1), np.int32) if symmetric or bits == 8 else codes[..., 0]
    scale = np.full((3, 2), 0.5, np.float32)
    scale[1] = 0.25
    blocks = CodeBlocks(codes, scale, zero)
    kind = fitting_type(blocks)
    assert kind is not None
    assert kind.name == f"Q{bits}_{0 if symmetric or bits == 8 else 1}"
    data = pack_blocks(blocks, kind)
    read = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.name]).reshape(3, 2, 32)
    assert np.array_equal(read, (codes - zero[..., None]) * scale[..., None])


def test_multipliers_and_codes_of_extremes_are_held(quantize_model: Quantize, tmp_path: Path) -> None:
    model = flux()
    quantize_model(model, bits=4, **GROUPS, group_scale="integer")
    layer = quantized(model)["transformer_blocks.0.ff.net.2"]
    assert layer.spec.weight == multiplied()
    generator = torch.Generator().manual_seed(0)
    steps, zero, multiplier = random_grid(layer, generator)
    codes = torch.randint(0, 16, (layer.shape[0], layer.columns), dtype=torch.uint8, generator=generator)
    layer.set_codes(codes, steps, zero, multiplier)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(write(model, tmp_path)[1]).tensors}
    found = tensors["transformer_blocks.0.ff.net.2.weight"]
    read = gguf.quants.dequantize(found.data, found.tensor_type)
    np.testing.assert_allclose(read, layer.weight.numpy(), rtol=1e-3, atol=float(steps.max()) * 1e-2)


def conv_unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "weight", "wanted"),
    [
        (conv_unet, {"bits": 8, "symmetric": True}, r"layer conv_in: got a convolution \(3 x 3\), .* a transformer"),
        (sd3, {"bits": 8}, r"layer \S+: got 8 bits with other zero points than 128, .* wanted weights.symmetric=true"),
        (sd3, {"bits": 4, **GROUPS, "group_size": 16}, r"got groups of 16 input channels, .* weights.group_size=32"),
    ],
)
def test_what_no_block_holds_is_refused_by_name(
    make: Callable[[], nn.Module], weight: dict[str, Any], wanted: str, quantize_model: Quantize, tmp_path: Path
) -> None:
    model = make()
    quantize_model(model, **weight)
    with pytest.raises(ArtifactError, match=wanted) as refused:
        write(model, tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_class_that_is_not_loaded_from_single_files_is_refused(
    tiny_model: Callable[[str], nn.Module], quantize_model: Quantize, tmp_path: Path
) -> None:
    model = tiny_model("dit")
    quantize_model(model, bits=4, symmetric=True)
    with pytest.raises(ArtifactError, match="got DiTTransformer2DModel, of which diffusers reads no single files"):
        write(model, tmp_path)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (
            LayerSpec(WeightSpec(8, type="e4m3")),
            "got e4m3 numbers, .* wanted int codes, as gguf-w8 has, or --format mod",
        ),
        (
            LayerSpec(WeightSpec(4), low_rank=4),
            r"got a low-rank branch of rank 4, .* none, as gguf-w4 has \(passes.low_rank null\)",
        ),
        (
            LayerSpec(WeightSpec(4), channel_scale=True),
            r"got scaled input channels, .* gguf-w4 has \(passes.scale null\)",
        ),
    ],
)
def test_a_layer_of_another_kind_is_refused_by_name(spec: LayerSpec, wanted: str, tmp_path: Path) -> None:
    model = sd3()
    build_quantized(model, ModelFormat({"proj_out": spec}, {}))
    with pytest.raises(ArtifactError, match=f"layer proj_out: {wanted}"):
        write(model, tmp_path)


def test_scales_that_float16_loses_are_refused(quantize_model: Quantize, tmp_path: Path) -> None:
    model = sd3()
    quantize_model(model, bits=8, symmetric=True)
    layer = quantized(model)["transformer_blocks.0.attn.to_q"]
    for scale in (3e-8, 1e6):
        layer.scale.fill_(scale)
        with pytest.raises(ArtifactError, match=r"layer transformer_blocks.0.attn.to_q: got scales up to "):
            write(model, tmp_path)
