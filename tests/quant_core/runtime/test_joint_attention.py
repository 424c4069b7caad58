"""Attentions over text and image tokens on Triton, against diffusers' own processors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from quant_core.runtime.build import build_runtime
from quant_core.runtime.joint_attention import JointProcessor, RotaryProcessor, fuse_attentions
from quant_spec.enums import KernelBackend
from quant_spec.formats import ModelFormat
from tests.quant_core.runtime.test_normalized import predict

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
OURS: dict[str, type] = {"sd3": JointProcessor, "flux": RotaryProcessor}


def processors(model: nn.Module) -> list[object]:
    found = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return [getattr(each, "inner", each) for each in found]


@pytest.mark.parametrize("family", OURS)
def test_tokens_are_put_together_as_diffusers_has_them(tiny_model: Make, family: str) -> None:
    model = tiny_model(family)
    want = predict(model)
    fuse_attentions(model)
    assert {type(each) for each in processors(model)} == {OURS[family]}
    got = predict(model)
    assert torch.equal(got, want) if family == "sd3" else torch.allclose(got, want, atol=1e-5)


def test_norms_of_heads_are_those_of_each_kind_of_tokens(tiny_model: Make) -> None:
    model = tiny_model("sd3")
    for module in list(model.modules()):
        if isinstance(getattr(module, "processor", None), JointAttnProcessor2_0):
            size = module.to_q.out_features // module.heads
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                norm = nn.RMSNorm(size, eps=1e-6)
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                setattr(module, name, norm.requires_grad_(False))
    want = predict(model)
    fuse_attentions(model)
    assert torch.equal(predict(model), want)


def test_a_runtime_model_on_triton_has_them_and_its_copy_too(tiny_model: Make, quantize_model: Quantize) -> None:
    for family, ours in OURS.items():
        model = tiny_model(family)
        quantize_model(model, bits=8)
        apart = copy.deepcopy(model)
        build_runtime(model, KernelBackend.TRITON)
        build_runtime(apart, KernelBackend.REFERENCE)
        assert {type(each) for each in processors(copy.deepcopy(model))} == {ours}
        assert not {type(each) for each in processors(apart)} & {ours}
        got, want = predict(model), predict(apart)
        assert float((got - want).norm()) <= 0.03 * float(want.norm())


def test_what_is_not_diffusers_own_stays(tiny_model: Make) -> None:
    class Mine(FluxAttnProcessor):
        """Somebody's."""

    model = tiny_model("flux")
    attentions = [module for module in model.modules() if hasattr(module, "processor")]
    attentions[0].processor = Mine()  # type: ignore[assignment]
    attentions[1].processor._attention_backend = "native"  # type: ignore[union-attr]
    fuse_attentions(model)
    assert type(attentions[0].processor) is Mine
    assert attentions[1].processor._attention_backend == "native"  # type: ignore[union-attr]
