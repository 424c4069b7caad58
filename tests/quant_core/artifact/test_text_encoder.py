"""Text encoders with packed weights: rounded from prompts, written, and loaded by plain transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quant_core  # noqa: F401  # registers the method
from quant_core.artifact.text_encoder import WEIGHTS_FILE, quantize_text_encoder
from quant_core.diffusion.encoder_calls import Call
from quant_core.errors import ArtifactError
from quant_core.fit.linear_tree import LinearTree
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import Granularity, NumberType, RangeMethod, RoundingMethod
from quant_spec.formats import WeightSpec
from quant_spec.passes.round import RoundFit
from quant_spec.ranges import RangeSpec

TOKENS = 9


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def clip() -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=16, eos_token_id=49,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


ENCODERS = {"t5": t5, "clip": clip}


def prompts(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (24, TOKENS), generator=torch.Generator().manual_seed(seed))}


def calls(seed: int = 0) -> list[Call]:
    return [Call((), {name: rows[start : start + 8] for name, rows in prompts(seed).items()}) for start in (0, 8, 16)]


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    torch.manual_seed(0)
    ENCODERS[kind]().to(dtype).save_pretrained(folder)
    return folder


def tree(bits: int = 4, method: RoundingMethod = RoundingMethod.CLOSED_FORM, **more: int) -> LinearTree:
    weight = WeightSpec(bits, granularity=Granularity.PER_GROUP, group_size=16)
    return LinearTree(weight, RangeSpec(RangeMethod.MSE), RoundFit(method=method), **more)


def loaded(folder: Path, **more: object) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, **more)


@torch.no_grad()
def outputs(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return model(**rows)[0].float()


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_loads_and_saves_what_was_rounded(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(kind, tmp_path / "source")
    made = quantize_text_encoder(source, calls(), tree(), tmp_path / "packed")
    original, model = loaded(source, dtype=torch.float32), loaded(tmp_path / "packed", dtype=dtype)
    linear = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    assert set(packed) == linear == set(made.layers)
    want = outputs(original, prompts(1))
    signal = 20 * torch.log10(want.norm() / (outputs(model, prompts(1)) - want).norm())
    assert float(signal) > 12
    # a layer multiplies with what its codes stand for
    tensors = load_file(tmp_path / "packed" / WEIGHTS_FILE)
    name, layer = next(iter(packed.items()))
    codes = tensors[f"{name}.qweight"]
    digits = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).float()
    zero, scale = (tensors[f"{name}.{leaf}"].float().repeat_interleave(16, 1) for leaf in ("zero_point", "scale"))
    x = torch.randn(3, layer.shape[1], generator=torch.Generator().manual_seed(2))
    bias = 0 if layer.bias is None else tensors[f"{name}.bias"].float()
    width = layer.shape[1]
    wanted = x @ ((digits[:, :width] - zero[:, :width]) * scale[:, :width]).T + bias
    torch.testing.assert_close(layer.float()(x) if dtype is torch.float32 else layer(x.to(dtype)).float(), wanted,
                               atol=1e-5 if dtype is torch.float32 else 0.05, rtol=1e-5)  # fmt: skip
    # embeddings and norms are the source's, bit for bit
    kept = load_file(source / "model.safetensors")
    for key in kept.keys() - {f"{each}.{leaf}" for each in linear for leaf in ("weight", "bias")}:
        assert torch.equal(kept[key], tensors[key]), key
    model = loaded(tmp_path / "packed", dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS_FILE)
    for each in packed:
        assert torch.equal(again[f"{each}.qweight"], tensors[f"{each}.qweight"])
        assert again[f"{each}.scale"].dtype == tensors[f"{each}.scale"].dtype
    assert torch.equal(outputs(loaded(tmp_path / "again", dtype=dtype), prompts(1)), outputs(model, prompts(1)))


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_would_change_a_packed_encoder_is_refused(kind: str, tmp_path: Path) -> None:
    quantize_text_encoder(saved(kind, tmp_path / "source"), calls(), tree(), tmp_path / "packed")
    model = loaded(tmp_path / "packed", dtype=torch.float32)
    want = outputs(model, prompts(1))
    for cast in (
        lambda: model.double(),
        lambda: model.bfloat16(),
        lambda: model.to(torch.float16),
        lambda: model.type(torch.float16),
    ):
        with pytest.raises(ArtifactError, match=r"cast: got torch\.\w+ for a packed \w+.*wanted torch_dtype"):
            cast()
    for name in ("add_adapter", "load_adapter"):
        with pytest.raises(ArtifactError, match=f"{name}: got a packed model.* wanted the LoRA fused into"):
            getattr(model, name)({})
    assert torch.equal(outputs(model.to("cpu"), prompts(1)), want)
    assert torch.equal(outputs(copy.deepcopy(model), prompts(1)), want)


def test_closed_form_is_better_than_nearest_and_groups_change_nothing(tmp_path: Path) -> None:
    source = saved("t5", tmp_path / "source", torch.float32)
    want = outputs(loaded(source), prompts())
    errors = {}
    for name, config in {
        "nearest": tree(3, RoundingMethod.NEAREST),
        "closed": tree(3),
        "one by one": tree(3, cache_bytes=1),
    }.items():
        quantize_text_encoder(source, calls(), config, tmp_path / name)
        errors[name] = float((outputs(loaded(tmp_path / name), prompts()) - want).norm())
    assert errors["closed"] < 0.9 * errors["nearest"]
    assert (tmp_path / "closed" / WEIGHTS_FILE).read_bytes() == (tmp_path / "one by one" / WEIGHTS_FILE).read_bytes()


def test_fp8_weights(tmp_path: Path) -> None:
    source = saved("clip", tmp_path / "source")
    config = LinearTree(WeightSpec(8, type=NumberType.E4M3), RangeSpec(), RoundFit(method=RoundingMethod.NEAREST))
    quantize_text_encoder(source, calls(), config, tmp_path / "packed")
    model = loaded(tmp_path / "packed", dtype=torch.float32)
    want = outputs(loaded(source, dtype=torch.float32), prompts(1))
    assert float((outputs(model, prompts(1)) - want).norm() / want.norm()) < 0.08


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    source = saved("t5", tmp_path / "source")
    quantize_text_encoder(source, calls(), tree(), tmp_path / "packed")
    with pytest.raises(ArtifactError, match="quantized already"):
        quantize_text_encoder(tmp_path / "packed", calls(), tree(), tmp_path / "twice")
    with pytest.raises(ArtifactError, match="not empty"):
        quantize_text_encoder(source, calls(), tree(), tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / WEIGHTS_FILE)
    name = next(name for name in tensors if name.endswith(".qweight"))
    for damage, message in ((tensors[name][:, :-1].contiguous(), "got \\("), (None, "missing 1 tensors")):
        broken = {key: value for key, value in tensors.items() if key != name}
        save_file(
            broken if damage is None else {**broken, name: damage},
            tmp_path / "packed" / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        with pytest.raises(ArtifactError, match=message):
            loaded(tmp_path / "packed")
