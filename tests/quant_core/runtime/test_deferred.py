"""Products that take up the gate and the sum behind them, against those that are computed at once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.runtime.build import build_runtime
from quant_core.runtime.deferred import Deferred
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend, NumberType
from quant_spec.formats import ActivationSpec, ModelFormat, WeightSpec
from tests.quant_core.conftest import FAMILIES
from tests.quant_core.runtime.test_normalized import block_of, noise, predict, run_block, runtime_layers

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
# Layers of each family whose sums are in the product, and how many of the products have a gate.
ADDED = {
    "dit": {f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn1.to_out.0", "ff.net.2")},
    "sd3": {
        *(f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn.to_out.0", "ff.net.2")),
        *(f"transformer_blocks.0.{name}" for name in ("attn.to_add_out", "ff_context.net.2")),
    },
    "flux": {
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_out.0", "to_add_out")),
        *(f"transformer_blocks.0.{name}.net.2" for name in ("ff", "ff_context")),
        *(f"single_transformer_blocks.{i}.proj_out" for i in (0, 1)),
    },
}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, bool]]:
    """Names of the layers that are multiplied late, and whether a residual and a gate were in it."""
    seen: list[tuple[str, bool, bool]] = []
    now = RuntimeLayer.multiply_now

    def look(self: RuntimeLayer, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        seen.append((self.run.layer, residual is not None, gate is not None))
        return now(self, x, residual, gate)

    monkeypatch.setattr(RuntimeLayer, "multiply_now", look)
    return seen


def at_once(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in runtime_layers(model):
        layer.defers = False
    return model


@pytest.mark.parametrize("family", ADDED)
def test_gates_and_sums_are_part_of_products(
    tiny_model: Make, quantize_model: Quantize, family: str, products: list[tuple[str, bool, bool]]
) -> None:
    model = tiny_model(family)
    quantize_model(model, bits=8)
    build_runtime(model, KernelBackend.TRITON)
    want = predict(at_once(model))
    assert not products
    got = predict(model)
    assert {name for name, summed, _ in products if summed} == ADDED[family]
    assert {name for name, _, gated in products if gated} == ADDED[family]
    assert len(products) == len(ADDED[family]), "each once"
    said = {layer.run.layer for layer in runtime_layers(model) if "gate and sum" in layer.run.reason}
    assert said >= ADDED[family]
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@pytest.mark.parametrize("weight", [WeightSpec(8), WeightSpec(8, type=NumberType.E4M3)])
@torch.no_grad()
def test_blocks_without_gates_have_sums(weight: WeightSpec, products: list[tuple[str, bool, bool]]) -> None:
    numbers = ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN, type=NumberType.E4M3)
    spec = numbers if weight.is_float else ActivationSpec(8)
    model = block_of(weight, spec, cross_attention_dim=24, activation_fn="geglu")
    build_runtime(model, KernelBackend.TRITON)
    got, want = ((each[0](noise(2, 7, 32), encoder_hidden_states=noise(2, 3, 24))) for each in (model, at_once(model)))
    assert [(name, summed) for name, summed, _ in products] == [
        ("0.attn1.to_out.0", True), ("0.attn2.to_out.0", True), ("0.ff.net.2", True),
    ]  # fmt: skip
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@torch.no_grad()
def test_what_else_reads_an_output_gets_the_layers() -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8))
    build_runtime(model, KernelBackend.TRITON)
    layer, plain = model[0].attn1.to_out[0], at_once(model)[0].attn1.to_out[0]  # type: ignore[union-attr, index]
    x = noise(2, 5, 32)
    out, want = layer(x), plain(x)
    assert isinstance(out, Deferred)
    assert type(want) is Tensor
    assert (out.shape, out.dtype) == (want.shape, want.dtype)
    assert isinstance(F.dropout(out, 0.5, training=False), Deferred)
    assert isinstance(out / 1.0, Deferred)
    assert torch.equal(out / 2.0, want / 2.0)
    assert torch.equal(out - want, torch.zeros_like(want))
    assert torch.equal(torch.cat([layer(x), want]), torch.cat([want, want]))
    assert torch.equal(layer(x)[:, 1:], want[:, 1:])
    assert torch.equal(layer(x) + 1.0, want + 1.0)
    assert torch.equal(layer(x) * noise(32), want * noise(32)), "no gate of samples"
    assert torch.equal(layer(x) + noise(2, 1, 32), want + noise(2, 1, 32)), "no residual"
    assert torch.equal(layer(x) + noise(2, 5, 32).double(), want + noise(2, 5, 32).double())
    twice = layer(x)
    assert torch.allclose(twice + want, want + want, atol=1e-6)
    assert torch.allclose(twice + x, want + x, atol=1e-6)
    assert torch.allclose(plain(layer(x)), plain(want), atol=1e-6), "another layer reads it"


def test_outputs_are_computed_at_once_where_gradients_or_tracing_need_it() -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8))
    build_runtime(model, KernelBackend.TRITON)
    layer = model[0].attn1.to_out[0]  # type: ignore[union-attr, index]
    x = noise(2, 5, 32)
    assert isinstance(layer(x), Deferred)
    assert type(layer(x[0])) is Tensor, "no samples and tokens"
    with torch.autocast("cpu", torch.bfloat16):
        assert type(layer(x)) is Tensor
    for backend in (KernelBackend.CPU, KernelBackend.REFERENCE):
        other = block_of(WeightSpec(8), ActivationSpec(8))
        build_runtime(other, backend)
        with torch.no_grad():
            assert type(other[0].attn1.to_out[0](x)) is Tensor  # type: ignore[union-attr, index]
            assert type(run_block(other)) is Tensor


def test_a_layer_in_differences_between_steps_is_computed_at_once() -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8, step_bits=(8, 8), differences=(1,)))
    build_runtime(model, KernelBackend.TRITON)
    assert not any(layer.defers for layer in runtime_layers(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_agree_with_the_reference(tiny_model: Make, quantize_model: Quantize, family: str) -> None:
    """Products taken up and joined, views in place of layouts, processors of our own: float rounding is all of it."""
    model = tiny_model(family)
    quantize_model(model, bits=8)
    plain = copy.deepcopy(model)
    build_runtime(plain, KernelBackend.REFERENCE)
    build_runtime(model, KernelBackend.TRITON)
    want = predict(plain)
    for _ in range(2):  # the second call joins products
        assert float((predict(model) - want).norm()) <= 1e-5 * float(want.norm())
