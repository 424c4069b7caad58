"""From a quantized model back to a plain one: the weights that the codes stand for, and float activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.errors import ArtifactError
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.feature_table import FeatureTable
from quant_core.nn.layers import QuantLayer


def dequantized_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the full-precision architecture, weights rounded to their grids.

    Tensors are on the model's device and in the dtype that it computes in; biases too.

    Raises
    ------
    ArtifactError
        If the model looks features up: the layers that they came from are not in it.
    """
    cached = [name for name, module in model.named_modules() if isinstance(module, FeatureTable)]
    if cached:
        raise ArtifactError(
            f"layer {cached[0]}: got a table of its outputs ({len(cached)} layers have one), wanted weights; "
            "quantize with passes.temporal.cache off"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    attentions = [name for name, module in model.named_modules() if isinstance(module, AttentionQuantizer)]
    own = tuple(f"{name}." for name in (*layers, *attentions))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    for name, layer in layers.items():
        weight = layer.unscaled(layer.weight)
        state[f"{name}.weight"] = weight.clone(memory_format=torch.contiguous_format)
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.to(weight.dtype)
    return state


def dequantize(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Return a plain diffusers model of the same class.

    Parameters
    ----------
    model : Module
        Quantized; left as it is.
    config : mapping
        Its config; `quantization_config` in it is passed over.

    Returns
    -------
    Module
        In eval mode, on the model's device.
    """
    plain_config = {key: value for key, value in config.items() if key != "quantization_config" and key[0] != "_"}
    state = dequantized_state(model)
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        plain: nn.Module = type(model).from_config(plain_config)  # type: ignore[attr-defined]
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.to(next(iter(state.values())).device).eval().requires_grad_(False)
