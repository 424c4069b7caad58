from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from quant_core.artifact.dequantize import dequantize, dequantized_state
from quant_core.nn.layers import QuantLayer
from quant_spec.formats import ModelFormat


def test_every_family_goes_back_to_its_architecture(
    any_model: nn.Module, quantize_model: Callable[..., ModelFormat]
) -> None:
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    quantize_model(any_model, bits=8)
    state = dequantized_state(any_model)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in before.items()}
    own = {f"{name}.weight" for name, module in any_model.named_modules() if isinstance(module, QuantLayer)}
    for name, value in state.items():
        if name in own:
            assert (value - before[name]).norm() < 0.01 * before[name].norm()
        else:
            assert torch.equal(value, before[name])
    plain = dequantize(any_model, any_model.config)
    assert type(plain) is type(any_model)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert not any(isinstance(module, QuantLayer) for module in plain.modules())


def test_the_quantized_model_is_left_alone(
    tiny_model: Callable[[str], nn.Module], quantize_model: Callable[..., ModelFormat]
) -> None:
    model = tiny_model("unet")
    quantize_model(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seed = torch.random.get_rng_state()
    dequantize(model, model.config)
    assert torch.equal(seed, torch.random.get_rng_state())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
