"""Layers that read the same input quantize it once: the queries, keys and values of an attention.

Their grids are the same where they were calibrated alike, which is looked at when the model is built. Whether they are
then called with the same input is looked at call by call, as keys and values of a cross-attention have another one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kernels.cpu_weight import CpuWeight
from kernels.fp8 import Fp8Matrix
from quant_core.runtime.joint_product import join_products
from quant_core.runtime.layer import RuntimeLayer

Codes = TypeVar("Codes")

#: Names of layers in an attention that may read the same tensor, in the order in which attentions call them.
TOGETHER = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


class SharedInput:
    """The codes of the last input of some layers, until the last of them has read them."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._known: tuple[int, Tensor | None] = (0, None)
        self._codes: Any = None

    def __deepcopy__(self, memo: dict[int, object]) -> SharedInput:
        """Keep nothing: layers of a copy share among themselves."""
        twin = SharedInput()
        memo[id(self)] = twin
        return twin

    def codes(self, x: Tensor, step: Tensor | None, make: Callable[[], Codes], *, is_last: bool) -> Codes:
        """Return the codes (or E4M3 numbers) of `x` at a step (the clock's index): made, or those of the last call.

        A tensor that was written to since is another one, and one that does not count that is never shared.
        """
        if x.is_inference():
            return make()
        known = (x._version, step)
        is_same = self._input() is x and self._known[0] == known[0] and self._known[1] is step
        codes: Codes = self._codes if is_same and self._codes is not None else make()
        if is_last:
            self._input, self._codes = lambda: None, None
        else:
            self._input, self._known, self._codes = weakref.ref(x), known, codes
        return codes


def share_inputs(model: nn.Module) -> None:
    """Let the attentions of a runtime model quantize what their layers read alike once, and multiply it together where
    that can be, in place."""  # fmt: skip
    for module in model.modules():
        for names in TOGETHER:
            layers = [layer for name in names if isinstance(layer := getattr(module, name, None), RuntimeLayer)]
            for group in _alike(layers):
                shared = SharedInput()
                for layer in group:
                    layer.share(shared, is_last=layer is group[-1])
                if getattr(module, "add_q_proj", None) is None:
                    # Tokens of two kinds are put one behind the other: views of a wider product are slower to copy.
                    join_products(group)


def _alike(layers: Sequence[RuntimeLayer]) -> list[list[RuntimeLayer]]:
    """Divide layers into those that quantize in the same way, of two at least, in their order."""
    groups: list[list[RuntimeLayer]] = []
    for layer in layers:
        if not _may_share(layer):
            continue
        found = next((group for group in groups if _quantize_alike(group[0], layer)), None)
        if found is None:
            groups.append([layer])
        else:
            found.append(layer)
    return [group for group in groups if len(group) > 1]


def _may_share(layer: RuntimeLayer) -> bool:
    """Whether a layer is one product of integer codes, or of E4M3 numbers, of its whole input."""
    plain = len(layer.parts) == 1 and layer.geometry is None and not layer.differences
    weight = layer.parts[0].weight
    return plain and layer.activation is not None and isinstance(weight, CpuWeight | Fp8Matrix | tuple)


def _quantize_alike(one: RuntimeLayer, other: RuntimeLayer) -> bool:
    """Whether two layers make the same codes, or numbers, of an input, at every step."""
    a, b = one.parts[0], other.parts[0]
    if one.activation != other.activation or one.clock is not other.clock or one.run.backend != other.run.backend:
        return False
    sums = [isinstance(part.weight, CpuWeight) and part.weight.correction is not None for part in (a, b)]
    if sums[0] != sums[1] or not _equal(a.channel_scale, b.channel_scale) or not _equal(a.tops, b.tops):
        return False
    if a.table is None or b.table is None:
        return a.table is b.table
    same = (a.table.bits, a.table.symmetric) == (b.table.bits, b.table.symmetric)
    pairs = [(getattr(a.table, name), getattr(b.table, name)) for name in ("scale", "zero_point", "divisor")]
    return same and all(_equal(*pair) for pair in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
