"""One product for layers that read the same input: the queries, keys and values of a self-attention.

Three products of few output channels each leave a part of a GPU idle at their ends; one of three times as many does
so once. Weights lie one behind the other, of which each layer has a view. Whether the layers are called with one input
is looked at call by call, as those of a cross-attention are not: from the first time on that they were.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.fp8 import Fp8Matrix
from kernels.weights import PackedWeight
from quant_spec.enums import KernelBackend

if TYPE_CHECKING:
    from quant_core.runtime.layer import RuntimeLayer

Weight = Fp8Matrix | tuple[PackedWeight, ...]
# What a packed weight has for each of its rows.
_ROWS = ("codes", "scale", "zero_point", "total")


class JointProduct:
    """The weights of some layers, and what is left of their last product for those that have not been called yet.

    Parameters
    ----------
    weight : Fp8Matrix or tuple of PackedWeight
        Of all layers, their output channels one behind the other.
    bias : Tensor, shape (sum of sizes,), or None
    sizes : sequence of int
        Output channels of each layer.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, sizes: Sequence[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, list(sizes)
        self.is_shared = False  # whether the last input of the first layer was the others' too
        self._input: Callable[[], Tensor | None] = lambda: None
        self._known: tuple[int, Tensor | None] = (0, None)
        self._outputs: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> JointProduct:
        """Keep no outputs: layers of a copy have products of their own."""
        twin = JointProduct(copy.deepcopy(self.weight, memo), copy.deepcopy(self.bias, memo), self.sizes)
        memo[id(self)] = twin
        return twin

    def output(self, number: int, layer: RuntimeLayer, x: Tensor) -> Tensor | None:
        """Return the output of the layer of that number, shape (..., N), a view of all layers'; None if it is to
        multiply by itself."""  # fmt: skip
        if x.is_inference():  # whether it was written to is not known
            return None
        step = None if layer.clock is None else layer.clock.index
        if number > 0:
            same = self._input() is x and self._known[0] == x._version and self._known[1] is step
            self.is_shared = same
            return self._outputs.pop(number, None) if same else None
        self._input, self._known, self._outputs = weakref.ref(x), (x._version, step), {}
        if not self.is_shared:
            return None
        self._outputs = dict(enumerate(layer.multiply_with(x, self.weight, self.bias).split(self.sizes, dim=-1)))
        return self._outputs.pop(0)


def join_products(layers: Sequence[RuntimeLayer]) -> None:
    """Let layers that quantize their input alike multiply it together, in place, where their weights can be joined."""
    for width in sorted({layer.shape[1] for layer in layers}):
        _join([layer for layer in layers if layer.shape[1] == width])


def _join(layers: Sequence[RuntimeLayer]) -> None:
    if len(layers) < 2 or not all(_is_joinable(layer) for layer in layers):
        return
    weights = [layer.parts[0].weight for layer in layers]
    made = _joined(weights)
    biases = [layer.bias for layer in layers]
    if made is None or len({None if each is None else each.dtype for each in biases}) > 1:
        return
    sizes = [layer.shape[0] for layer in layers]
    bias = None if biases[0] is None else torch.cat([each for each in biases if each is not None])
    joint = JointProduct(made, bias, sizes)
    first = 0
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        layer.join(joint, number, _rows(made, first, size))
        first += size


def _is_joinable(layer: RuntimeLayer) -> bool:
    """Whether a layer is nothing but a product of codes, or of E4M3 numbers, on Triton."""
    plain = layer.geometry is None and len(layer.parts) == 1 and not layer.differences and layer.branch is None
    if not plain or layer.run.backend is not KernelBackend.TRITON or layer.activation is None:
        return False
    return layer.parts[0].channels is None and layer.gate is None


def _joined(weights: Sequence[object]) -> Weight | None:
    """Put the output channels of weights one behind the other; None where that is not simple."""
    matrices = [each for each in weights if isinstance(each, Fp8Matrix)]
    if len(matrices) == len(weights):
        if any(each.switches for each in matrices):  # PyTorch's product was faster for some
            return None
        return Fp8Matrix(torch.cat([each.values for each in matrices]), torch.cat([each.scale for each in matrices]))
    packed = [each[0] for each in weights if isinstance(each, tuple) and len(each) == 1]
    if len(packed) < len(weights) or len({(each.layout, each.scale.dtype, each.total.dtype) for each in packed}) > 1:
        return None
    if any(each.channel is not None or each.whole is not None or each.layout.has_group_scales for each in packed):
        return None
    named = {name: torch.cat([getattr(each, name) for each in packed]) for name in _ROWS}
    factors = [each.factor for each in packed if each.factor is not None]
    return (replace(packed[0], **named, factor=torch.cat(factors, dim=1) if factors else None),)


def _rows(weight: Weight, first: int, size: int) -> Weight:
    """View some output channels of a weight; kernels read factors of groups of these alone, so they are copied."""
    if isinstance(weight, Fp8Matrix):
        return Fp8Matrix(weight.values[first : first + size], weight.scale[first : first + size])
    named = {name: getattr(weight[0], name)[first : first + size] for name in _ROWS}
    factor = weight[0].factor
    factor = None if factor is None else factor[:, first : first + size].contiguous()
    return (replace(weight[0], **named, factor=factor),)
