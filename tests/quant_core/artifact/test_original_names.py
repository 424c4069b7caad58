"""Files in the names of the authors' checkpoints: diffusers' own conversion of these gives the release's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from torch import Tensor, nn

from quant_core.artifact.comfy_int8 import comfy_int8
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.gguf_file import write_gguf
from quant_core.artifact.original_names import naming_of, original_tensors
from quant_core.errors import ArtifactError
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import Granularity

GROUPS = {"granularity": Granularity.PER_GROUP, "group_size": 32}
Quantize = Callable[..., Any]


def sd3() -> Any:
    """Two joint blocks, the first with a second attention, and norms of queries and keys, as SD3.5 has them."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> Any:
    """A double and a single block."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def random_norms(model: nn.Module) -> None:
    """Give norms of queries and keys values to tell them apart by."""
    for name, value in model.named_parameters():
        if "norm" in name and name.endswith(("_q.weight", "_k.weight")):
            nn.init.uniform_(value.detach())


def written(model: Any, file: Path) -> dict[str, Any]:
    """Write a file in original names; return its tensors by name."""
    model.save_config(file.parent)
    write_gguf(model, model.config, file, artifact="0" * 64, original=True)
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.architecture"].contents() == naming_of(type(model).__name__).architecture
    return {tensor.name: tensor for tensor in reader.tensors}


def test_diffusers_turns_the_names_back(quantize_model: Quantize, tmp_path: Path) -> None:
    model = sd3()
    random_norms(model)
    quantize_model(model, bits=4, **GROUPS)
    tensors = written(model, tmp_path / "model.gguf")
    assert tensors["joint_blocks.0.x_block.attn.qkv.weight"].tensor_type.name == "Q4_1"
    loaded = type(model).from_single_file(
        str(tmp_path / "model.gguf"), config=str(tmp_path), torch_dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    wanted = dequantized_state(model)
    assert loaded.state_dict().keys() == wanted.keys()
    for name, value in loaded.state_dict().items():
        read = dequantize_gguf_tensor(value).float()
        torch.testing.assert_close(read, wanted[name], rtol=2e-3, atol=2e-3 * float(wanted[name].abs().max()))
    assert sum(isinstance(module, GGUFLinear) for module in loaded.modules()) > 30


def test_comfys_int8_rule_gives_the_releases_weights(quantize_model: Quantize, tmp_path: Path) -> None:
    model = sd3()
    random_norms(model)
    quantize_model(model, bits=8, symmetric=True)
    model.save_config(tmp_path)
    state = comfy_int8(model, model.config)
    plain = {}
    for name, value in state.items():
        mark = f"{name.removesuffix('weight')}comfy_quant"
        if name.endswith("weight") and mark in state:
            scale = state[f"{name}_scale"]
            assert (value.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(value), 1))
            assert json.loads(state[mark].numpy().tobytes()) == {"format": "int8_tensorwise"}
            plain[name] = value.float() * scale
        elif not name.endswith((".weight_scale", ".comfy_quant")):
            plain[name] = value
    # queries, keys and values of 2 blocks are 5 tensors in place of 15, less the patch embedding
    layers = sum(isinstance(module, QuantLayer) for module in model.modules())
    assert sum(name.endswith(".comfy_quant") for name in state) == layers - 10 - 1
    loaded = type(model).from_single_file(plain, config=str(tmp_path), torch_dtype=torch.float32)
    wanted = dequantized_state(model)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_fluxs_tensors_are_those_of_its_checkpoints(quantize_model: Quantize, tmp_path: Path) -> None:
    model = flux()
    random_norms(model)
    quantize_model(model, bits=8, symmetric=True, **GROUPS)
    tensors, wanted = written(model, tmp_path / "model.gguf"), dequantized_state(model)
    ends = ("weight", "bias")
    layers = [f"{part}_in.{layer}" for part in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")]
    layers += ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    for side in ("img", "txt"):
        layers += [
            f"double_blocks.0.{side}_{layer}" for layer in ("attn.qkv", "attn.proj", "mod.lin", "mlp.0", "mlp.2")
        ]
    layers += [f"single_blocks.0.{layer}" for layer in ("linear1", "linear2", "modulation.lin")]
    norms = {
        f"double_blocks.0.{side}_attn.norm.{each}_norm.scale" for side in ("img", "txt") for each in ("query", "key")
    }
    norms |= {f"single_blocks.0.norm.{each}_norm.scale" for each in ("query", "key")}
    assert set(tensors) == {f"{layer}.{end}" for layer in layers for end in ends} | norms

    def read(name: str) -> Tensor:
        return torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type))

    single = "single_transformer_blocks.0"
    parts = [wanted[f"{single}.{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(read("single_blocks.0.linear1.weight"), torch.cat(parts))
    assert torch.equal(read("double_blocks.0.txt_mlp.2.weight"), wanted["transformer_blocks.0.ff_context.net.2.weight"])
    scale, shift = wanted["norm_out.linear.weight"].chunk(2)
    assert torch.equal(read("final_layer.adaLN_modulation.1.weight"), torch.cat([shift, scale]))
    for name, source in (("txt_attn.norm.key", "attn.norm_added_k"), ("img_attn.norm.query", "attn.norm_q")):
        got = np.array(tensors[f"double_blocks.0.{name}_norm.scale"].data)
        assert np.array_equal(got, wanted[f"transformer_blocks.0.{source}.weight"].numpy())


def test_parts_of_one_tensor_get_a_type_that_holds_all(quantize_model: Quantize, tmp_path: Path) -> None:
    model = sd3()
    quantize_model(model, bits=4, symmetric=True, **GROUPS)
    key: Any = model.get_submodule("transformer_blocks.0.attn.to_k")
    key.zero_point.fill_(3)
    tensors = written(model, tmp_path / "model.gguf")
    assert tensors["joint_blocks.0.x_block.attn.qkv.weight"].tensor_type.name == "Q4_1"
    assert tensors["joint_blocks.1.x_block.attn.qkv.weight"].tensor_type.name == "Q4_0"


def test_tensors_without_a_name_are_refused() -> None:
    naming = naming_of("SD3Transformer2DModel")
    with pytest.raises(ArtifactError, match=r"tensor other.weight: got no name for it in sd3's checkpoints"):
        original_tensors(naming, ["proj_out.weight", "other.weight"])
    with pytest.raises(ArtifactError, match=r"tensor joint_blocks.0.x_block.attn.qkv.weight: got transformer_blocks"):
        original_tensors(naming, ["transformer_blocks.0.attn.to_q.weight"])
    with pytest.raises(ArtifactError, match=r"got DiTTransformer2DModel, .* wanted SD3Transformer2DModel or Flux"):
        naming_of("DiTTransformer2DModel")


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        ({"bits": 8}, "got zero points other than 128, .* wanted weights.symmetric=true"),
        ({"bits": 4, **GROUPS}, "got scales per_group, .* wanted weights.granularity=per_channel"),
    ],
)
def test_comfys_int8_refuses_what_it_cannot_hold(weight: dict[str, Any], wanted: str, quantize_model: Quantize) -> None:
    model = sd3()
    quantize_model(model, **weight)
    with pytest.raises(ArtifactError, match=rf"^layer \S+: {wanted}"):
        comfy_int8(model, model.config)
