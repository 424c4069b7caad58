"""A full-precision model one part of which is quantized for a while: an input, an attention's products, a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quant_core.fit.unit_state import UnitState
from quant_core.nn.attention import AttentionQuantizer, wrap_processor
from quant_core.nn.layers import QuantLayer
from quant_core.nn.steps import StepClock


class Exchange:
    """Exchanges parts of a full-precision model for those of quantized units, and back.

    Parameters
    ----------
    model : nn.Module
    clock : StepClock
        Says at which trajectory step the model runs; whoever calls the model sets it.
    """

    def __init__(self, model: nn.Module, clock: StepClock) -> None:
        self.model, self.clock = model, clock

    def held(self, name: str) -> tuple[Tensor, ...]:
        """Return what a layer has: its weight, and its bias if it has one."""
        return tuple(parameter.data for parameter in self._parameters(name))

    def hold(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Let a layer have these: its weight, and its bias if it has one."""
        for parameter, tensor in zip(self._parameters(name), tensors, strict=True):
            parameter.data = tensor.to(parameter.data)

    def rounded(self, state: UnitState, name: str) -> tuple[Tensor, ...]:
        """Return weight and bias of a state as the full-precision layer would hold them."""
        layer = self._layer(state, name)
        weight = layer.unscaled(layer.weight)
        return (weight,) if layer.bias is None else (weight, layer.bias)

    @contextmanager
    def holding(self, name: str, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Let one layer have another weight, and bias."""
        before = self.held(name)
        self.hold(name, tensors)
        try:
            yield
        finally:
            self.hold(name, before)

    @contextmanager
    def quantized_input(self, state: UnitState, name: str) -> Iterator[None]:
        """Let one layer read its input quantized."""
        layer, module = self._layer(state, name), self.model.get_submodule(name)
        handle = module.register_forward_pre_hook(_reads(layer))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def quantized_attention(self, state: UnitState, name: str) -> Iterator[None]:
        """Let one attention compute with quantized operands."""
        attention = self.model.get_submodule(name)
        device = next(self.model.parameters()).device
        quantizer = AttentionQuantizer(state.formats.attentions[name], self.clock, device)
        _load(quantizer, f"{name}.attention_quantizer.", state)
        undo = wrap_processor(attention, quantizer)
        try:
            yield
        finally:
            undo()

    def _layer(self, state: UnitState, name: str) -> QuantLayer:
        """Make a quantized layer, with what a state has of it."""
        layer = QuantLayer(self.model.get_submodule(name), state.formats.layers[name], self.clock)  # type: ignore[arg-type]
        _load(layer, f"{name}.", state)
        return layer

    def _parameters(self, name: str) -> list[nn.Parameter]:
        layer = self.model.get_submodule(name)
        parts = (layer.get_parameter(part) for part in ("weight", "bias") if getattr(layer, part) is not None)
        return list(parts)


def _reads(layer: QuantLayer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return a hook that quantizes a layer's input, in the input's own units."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = layer.quantize_input(args[0])
        if layer.spec.channel_scale:
            scales = torch.cat([part.get_buffer("channel_scale") for part in layer.act_quantizers])
            x = x * (scales if layer.kind is nn.Linear else scales.reshape(-1, *(1,) * (x.dim() - 2))).to(x)
        return (x, *args[1:])

    return hook


def _load(module: nn.Module, prefix: str, state: UnitState) -> None:
    """Copy what a state has below a prefix into a module."""
    own = module.state_dict(keep_vars=True)
    for name, tensor in state.tensors.items():
        if name.startswith(prefix):
            own[name.removeprefix(prefix)].data.copy_(tensor)
