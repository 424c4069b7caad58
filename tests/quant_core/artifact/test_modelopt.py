"""ModelOpt's FP8 layout: reading a file back by its rule gives the release's weights."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from kernels.fp8 import FP8
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.modelopt import modelopt_fp8
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QUANTIZABLE, QuantLayer, weight_matrix
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, WeightSpec

PER_TOKEN = LayerSpec(WeightSpec(8, type="e4m3"), ActivationSpec(8, type="e4m3", mode=ActivationMode.DYNAMIC_TOKEN))
PER_TENSOR = LayerSpec(
    WeightSpec(8, type="e4m3", granularity="per_tensor"), ActivationSpec(8, type="e4m3", mode=ActivationMode.STATIC)
)


def quantized(spec: LayerSpec, keep: str = "proj_out", attentions: dict[str, AttentionSpec] | None = None) -> nn.Module:
    """A joint transformer with all layers in one format, except one."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, QUANTIZABLE)}
    del weights[keep]
    formats = ModelFormat(dict.fromkeys(weights, spec), attentions or {})
    for name, layer in build_quantized(model, formats).layers.items():
        if not spec.weight.is_float:
            continue
        matrix = weight_matrix(weights[name])
        scale = matrix.abs().amax(dim=1, keepdim=True) / 448 if len(layer.scale) > 1 else matrix.abs().max() / 448
        layer.set_numbers((matrix / scale).to(FP8), scale)
        for quantizer in layer.act_quantizers:
            if "scale" in dict(quantizer.named_buffers()):
                quantizer.scale.fill_(0.01 + len(name) / 1000)
    return model


@pytest.mark.parametrize(
    ("spec", "algorithm", "shape"),
    [(PER_TOKEN, "FP8_PER_CHANNEL_PER_TOKEN", (32,)), (PER_TENSOR, "FP8", ())],
    ids=["per token", "per tensor"],
)
def test_the_layouts_rule_gives_the_releases_weights(spec: LayerSpec, algorithm: str, shape: tuple[int, ...]) -> None:
    model = quantized(spec)
    state, config = modelopt_fp8(model)
    assert config["quant_algo"] == algorithm
    assert config["quant_method"] == config["producer"]["name"] == "modelopt"
    assert config["ignore"] == ["proj_out"]
    wanted = dequantized_state(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer) and m.kind is nn.Linear}
    for name, layer in layers.items():
        number, scale = state[f"{name}.weight"], state[f"{name}.weight_scale"]
        assert (number.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        read = number.float() * (scale[:, None] if scale.dim() else scale)
        assert torch.equal(read, wanted[f"{name}.weight"]), name
        assert (f"{name}.input_scale" in state) == (algorithm == "FP8")
        if algorithm == "FP8":
            (quantizer,) = layer.act_quantizers
            assert torch.equal(state[f"{name}.input_scale"], quantizer.scale.squeeze())
    assert state["transformer_blocks.0.attn.to_q.weight_scale"].shape == shape
    added = {key for key in state if key.endswith((".weight_scale", ".input_scale"))}
    assert state.keys() - added == wanted.keys()
    assert state["pos_embed.proj.weight"].dtype == torch.float32  # a convolution: in floats, as ModelOpt leaves it


def test_static_ranges_are_told_as_the_tools_converter_tells_them() -> None:
    """The groups that compressed-tensors' readers take; copied from a file of nvidia-modelopt 0.47.0."""
    float8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    config = modelopt_fp8(quantized(PER_TENSOR))[1]
    assert config["config_groups"] == {
        "group_0": {"input_activations": float8, "weights": float8, "targets": ["Linear"]}
    }
    assert "config_groups" not in modelopt_fp8(quantized(PER_TOKEN))[1]


def _activation(**told: Any) -> LayerSpec:
    return LayerSpec(WeightSpec(8, type="e4m3"), ActivationSpec(8, **told))


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (LayerSpec(WeightSpec(8), ActivationSpec(8)), "got int weights and int inputs, .* wanted e4m3 of both"),
        (LayerSpec(WeightSpec(8, type="e4m3")), "got e4m3 weights and inputs as they are, .* as fp8-w8a8 has"),
        (_activation(mode=ActivationMode.STATIC, type="e4m3"), "got weights per_channel with inputs static, "),
        (_activation(mode=ActivationMode.PER_STEP, type="e4m3"), "inputs per_step, .* per_channel with dynamic_token"),
        (
            LayerSpec(PER_TOKEN.weight, PER_TOKEN.activation, channel_scale=True),
            r"got scaled input channels, .* wanted none, as fp8-w8a8 has \(passes.scale null\)",
        ),
    ],
)
def test_other_formats_are_refused_by_name(spec: LayerSpec, wanted: str) -> None:
    model = quantized(spec)
    with pytest.raises(ArtifactError, match=rf"^layer \S+: .*{wanted}"):
        modelopt_fp8(model)


def test_a_model_of_both_formats_is_refused() -> None:
    model = quantized(PER_TOKEN)
    build_quantized(model, ModelFormat({"proj_out": PER_TENSOR}, {}))
    with pytest.raises(ArtifactError, match=r"^model: got layers of FP8 and FP8_PER_CHANNEL_PER_TOKEN, .* wanted one"):
        modelopt_fp8(model)


def test_quantized_attention_is_refused() -> None:
    attention = AttentionSpec(ActivationSpec(8, type="e4m3", mode=ActivationMode.DYNAMIC_TOKEN))
    model = quantized(PER_TOKEN, attentions={"transformer_blocks.0.attn": attention})
    with pytest.raises(
        ArtifactError, match=r"^attention transformer_blocks.0.attn\S*: .* wanted attention.enabled=false"
    ):
        modelopt_fp8(model)


def test_convolutions_of_a_unet_are_refused() -> None:
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32,), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    build_quantized(model, ModelFormat({"conv_in": PER_TOKEN}, {}))
    with pytest.raises(ArtifactError, match=r"^layer conv_in: got a convolution \(3 x 3\), .* a transformer"):
        modelopt_fp8(model)
