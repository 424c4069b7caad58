"""Transformers of UNets on images that lie channels last, against diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from quant_core.runtime.build import build_runtime
from quant_core.runtime.fused_transformer import FusedTransformer2D, fuse_transformers
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend
from quant_spec.formats import ModelFormat
from tests.quant_core.runtime.test_normalized import noise, predict

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
# Projections of the one are convolutions, of the other Linears.
FAMILIES = ("text_unet", "sdxl_unet")


def transformers(model: nn.Module) -> list[Transformer2DModel]:
    return [module for module in model.modules() if isinstance(module, Transformer2DModel)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_model_gives_the_same(tiny_model: Make, family: str) -> None:
    model = tiny_model(family)
    want = predict(model)
    fuse_transformers(model)
    assert {type(each) for each in transformers(model)} == {FusedTransformer2D}
    assert torch.allclose(predict(model), want, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode", [ActivationMode.PER_STEP, pytest.param(ActivationMode.DYNAMIC_SAMPLE, marks=pytest.mark.slow)]
)
def test_a_runtime_model_normalizes_in_its_projection(
    tiny_model: Make, quantize_model: Quantize, family: str, mode: ActivationMode
) -> None:
    model = tiny_model(family)
    quantize_model(model, mode, bits=8)
    plain = copy.deepcopy(model)
    build_runtime(model, KernelBackend.TRITON)
    build_runtime(plain, KernelBackend.REFERENCE)
    assert {type(each) for each in transformers(plain)} == {Transformer2DModel}
    has_tables = mode is ActivationMode.PER_STEP
    for each in transformers(model):
        assert isinstance(each, FusedTransformer2D)
        assert isinstance(each.norm, nn.Identity) is has_tables
        assert isinstance(each.proj_in, RuntimeLayer)
        assert ("GroupNorm with the quantization" in each.proj_in.run.reason) is has_tables
    got, want = predict(copy.deepcopy(model)), predict(plain)
    assert float((got - want).norm()) <= 0.05 * float(want.norm())


@torch.no_grad()
def test_nothing_is_laid_out_anew(tiny_model: Make, quantize_model: Quantize) -> None:
    model = tiny_model("sdxl_unet")
    quantize_model(model, bits=8)
    build_runtime(model, KernelBackend.TRITON)
    (first, *_) = transformers(model)
    image = noise(2, first.config.in_channels, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(record_shapes=False) as profile:
        (out,) = first(image, encoder_hidden_states=noise(2, 5, 12), return_dict=False)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not [
        event.key for event in profile.key_averages() if event.key in ("aten::contiguous", "aten::native_group_norm")
    ]
