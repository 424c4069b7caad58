"""Queries, keys and values of one input are one product, and give what they gave."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quant_core.runtime.build import build_runtime
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend, NumberType, WeightMemory
from quant_spec.formats import ActivationSpec
from tests.quant_core.runtime.test_normalized import predict
from tests.quant_core.runtime.test_shared_input import NAMES, attention, noise, unshared

FLOATS = ActivationSpec(8, type=NumberType.E4M3, mode=ActivationMode.DYNAMIC_TOKEN)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that multiplied for all."""
    seen: list[str] = []
    own = RuntimeLayer.multiply_with

    def look(self: RuntimeLayer, x: Tensor, *weight: object) -> Tensor:
        seen.append(self.run.layer)
        return own(self, x, *weight)  # type: ignore[arg-type]

    monkeypatch.setattr(RuntimeLayer, "multiply_with", look)
    return seen


def layers(model: nn.Module) -> list[RuntimeLayer]:
    return [model.get_submodule(f"0.{name}") for name in NAMES]  # type: ignore[misc]


@pytest.mark.parametrize("activation", [ActivationSpec(8), ActivationSpec(8, step_bits=(8, 4, 6)), FLOATS], ids=str)
@torch.no_grad()
def test_layers_of_one_input_multiply_together_from_the_second_call_on(
    activation: ActivationSpec, products: list[str]
) -> None:
    model, clock = attention(activation)
    build_runtime(model, KernelBackend.TRITON)
    assert all("one product of several layers" in layer.run.reason for layer in layers(model))
    for call, timestep in enumerate((500.0, 500.0, 100.0)):
        clock.set_timestep(timestep)
        x = noise(2, 5, 32) * (1 + call)
        assert torch.equal(model[0](x), unshared(model)[0](x))
        assert products == ["0.to_q"] * call
    x, alone = noise(2, 5, 32), unshared(model)
    model[0](x)
    x.mul_(2)
    assert torch.equal(model[0](x), alone[0](x)), "what was written to is another input"
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0](x), alone[0](x))
    assert {id(layer.joint) for layer in layers(twin)} != {id(layer.joint) for layer in layers(model)}


@torch.no_grad()
def test_other_inputs_are_multiplied_by_themselves(products: list[str]) -> None:
    model, _ = attention(ActivationSpec(8), cross=32)
    build_runtime(model, KernelBackend.TRITON)
    alone, x, text = unshared(model), noise(2, 5, 32), noise(2, 7, 32)
    for _ in range(3):
        assert torch.equal(model[0](x, text), alone[0](x, text))
    assert not products
    for _ in range(2):
        assert torch.equal(model[0](x), alone[0](x))
    assert products == ["0.to_q"]
    assert torch.equal(model[0](x, text), alone[0](x, text)), "one product too many, and right"
    products.clear()
    assert torch.equal(model[0](x, text), alone[0](x, text))
    assert not products


@torch.no_grad()
def test_weights_are_kept_once() -> None:
    model, _ = attention(ActivationSpec(8))
    build_runtime(model, KernelBackend.TRITON)
    first, *rest = layers(model)
    assert first.joint is not None
    assert isinstance(first.joint.weight, tuple)
    storage = first.joint.weight[0].codes.untyped_storage().data_ptr()
    for layer in (first, *rest):
        weight = layer.parts[0].weight
        assert isinstance(weight, tuple)
        assert weight[0].codes.untyped_storage().data_ptr() == storage
        assert weight[0].rows == layer.shape[0]


@pytest.mark.parametrize(("backend", "other"), [(KernelBackend.CPU, ""), (KernelBackend.TRITON, "to_k")])
@torch.no_grad()
def test_layers_that_quantize_otherwise_stay_alone(backend: KernelBackend, other: str) -> None:
    model, _ = attention(ActivationSpec(8), other=other)
    build_runtime(model, backend)
    joined = [layer.joint is not None for layer in layers(model)]
    assert joined == ([True, False, True] if other else [False] * 3)
    x = noise(2, 5, 32)
    assert torch.equal(model[0](x), unshared(model)[0](x))
    if other:  # the two that are alike
        assert torch.equal(model[0](x), unshared(model)[0](x))


@torch.no_grad()
def test_tokens_that_are_put_together_are_multiplied_apart(
    tiny_model: Callable[[str], nn.Module], quantize_model: Callable[..., object]
) -> None:
    for family, joined in (("sd3", set()), ("flux", {"single_transformer_blocks"})):
        model = tiny_model(family)
        quantize_model(model, bits=8)
        build_runtime(model, KernelBackend.TRITON, memory=WeightMemory.FAST)
        found = {
            name.split(".")[0]
            for name, layer in model.named_modules()
            if isinstance(layer, RuntimeLayer) and layer.joint is not None
        }
        assert found == joined


@torch.no_grad()
def test_packed_weights_in_groups_are_one_product(products: list[str]) -> None:
    model, _ = attention(ActivationSpec(8), groups=True)
    build_runtime(model, KernelBackend.TRITON, memory=WeightMemory.PACKED)
    joint = layers(model)[0].joint
    assert joint is not None
    assert isinstance(joint.weight, tuple)
    assert joint.weight[0].factor is not None
    x = noise(2, 5, 64)
    for _ in range(2):
        assert torch.equal(model[0](x), unshared(model)[0](x))
    assert products == ["0.to_q"]


@pytest.mark.parametrize("family", ["dit", "flux", "sdxl_unet"])
def test_whole_models_give_the_same_from_the_second_call_on(
    tiny_model: Callable[[str], nn.Module],
    quantize_model: Callable[..., object],
    family: str,
    products: list[str],
) -> None:
    model = tiny_model(family)
    quantize_model(model, bits=8)
    build_runtime(model, KernelBackend.TRITON, memory=WeightMemory.FAST)
    first = predict(model)
    assert not products
    assert torch.equal(predict(model), first)
    assert products
