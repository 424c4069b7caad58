"""Queries, keys and values quantize an input that they all read once, and give what they gave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quant_core.nn.layers import QuantLayer, replace_module
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime import layer as runtime_layer
from quant_core.runtime.build import build_runtime
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend, NumberType
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec
from tests.quant_core.multiplied import multiplied, random_grid

STEPS = (900.0, 500.0, 100.0)
NAMES = ("to_q", "to_k", "to_v")


def attention(
    activation: ActivationSpec, cross: int | None = None, other: str = "", groups: bool = False
) -> tuple[nn.Module, StepClock]:
    """An attention on quantized projections, whose grids are alike but for those of the layer `other`; with `groups` on
    64 channels of 4 bits in groups of 32 that have multipliers."""
    torch.manual_seed(0)
    made = nn.Sequential(
        Attention(64 if groups else 32, cross_attention_dim=cross, heads=2, dim_head=16).eval().requires_grad_(False)
    )
    clock, generator = StepClock(STEPS), torch.Generator().manual_seed(0)
    for name in NAMES:
        weight = WeightSpec(8, type=activation.type) if activation.is_float else WeightSpec(8, symmetric=True)
        layer = QuantLayer(getattr(made[0], name), LayerSpec(multiplied() if groups else weight, activation), clock)
        codes = torch.randint(0, 256, (layer.shape[0], layer.columns), generator=generator, dtype=torch.uint8)
        if activation.is_float:
            layer.qweight.copy_(codes.float() - 128)
            layer.scale.fill_(0.002)
        elif groups:
            layer.set_codes(codes % 16, *random_grid(layer, generator))
        else:
            layer.set_codes(codes, torch.full_like(layer.scale, 0.002), torch.full_like(layer.zero_point, 128))
        for quantizer in layer.act_quantizers:
            if not quantizer.spec.is_dynamic:
                steps = torch.linspace(0.02, 0.05, len(quantizer.scale)) * (1.5 if name == other else 1.0)
                quantizer.set_qparams(QParams(steps, torch.full_like(steps, 0.0 if activation.is_float else 120.0)))
        replace_module(made, f"0.{name}", layer)
    clock.set_timestep(500.0)
    return made, clock


def count(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that holds every input that is quantized from now on."""
    seen: list[Tensor] = []

    def counted(function: Any) -> Any:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(x)
            return function(x, *args, **kwargs)

        return call

    for name in ("quantize_by_table", "quantize_dynamic", "quantize_cpu", "quantize_fp8", "to_fp8"):
        monkeypatch.setattr(runtime_layer, name, counted(getattr(runtime_layer, name)))
    return seen


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def unshared(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, RuntimeLayer):
            module.shared = module.joint = None
    return twin


@pytest.mark.parametrize("backend", [KernelBackend.TRITON, KernelBackend.CPU])
@pytest.mark.parametrize(
    ("activation", "cross", "other", "times"),
    [
        (ActivationSpec(8), None, "", 1),
        (ActivationSpec(8, step_bits=(8, 4, 6)), None, "", 1),
        (ActivationSpec(8), 24, "", 2),
        (ActivationSpec(8), None, "to_k", 2),
        (ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN), None, "", 1),
        (ActivationSpec(8, type=NumberType.E4M3), None, "", 1),
        (ActivationSpec(8, type=NumberType.E4M3), 24, "to_k", 3),
        (ActivationSpec(8, type=NumberType.E4M3, mode=ActivationMode.DYNAMIC_TOKEN), None, "", 1),
    ],
    ids=str,
)
@torch.no_grad()
def test_an_input_is_quantized_once(
    backend: KernelBackend,
    activation: ActivationSpec,
    cross: int | None,
    other: str,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend is KernelBackend.CPU and (activation.is_float or activation.mode is ActivationMode.DYNAMIC_TOKEN):
        pytest.skip("these multiply floats")
    model, clock = attention(activation, cross, other)
    build_runtime(model, backend)
    for module in model.modules():
        if isinstance(module, RuntimeLayer):
            module.calls = None  # as layers that are not small
    alone = unshared(model)
    x, text = noise(2, 5, 32), None if cross is None else noise(2, 7, cross)
    want, seen = alone[0](x, text), count(monkeypatch)
    assert torch.equal(model[0](x, text), want)
    assert len(seen) == times
    # The same tensors at another step, and after they were written to.
    clock.set_timestep(100.0)
    for tensor in (x, text):
        seen.clear()
        other_step = unshared(model)[0](x, text)
        seen.clear()
        assert torch.equal(model[0](x, text), other_step)
        assert len(seen) == times
        if tensor is not None:
            tensor.mul_(2)


@torch.no_grad()
def test_codes_are_not_kept_after_the_last_reader_or_in_a_copy() -> None:
    model, _ = attention(ActivationSpec(8))
    build_runtime(model, KernelBackend.TRITON)
    x, layers = noise(2, 5, 32), [model.get_submodule(f"0.{name}") for name in NAMES]
    shared = layers[0].shared
    assert shared is not None
    assert all(layer.shared is shared for layer in layers)
    assert "an input that several read quantized once" in layers[0].run.reason
    layers[0](x)
    twin = copy.deepcopy(model)
    copied = {id(twin.get_submodule(f"0.{name}").shared) for name in NAMES}
    assert len(copied) == 1
    assert id(shared) not in copied
    assert shared._codes is not None
    layers[2](x)
    assert shared._codes is None
