"""A small quantized layer on the CPU in one compiled call: norm, quantization, product, scales, bias, residual.

Such a layer takes less time than some ten calls of PyTorch do. What of a call does not depend on its values, sizes and
addresses of weights, is prepared once for each shape of input. `kernels.cpu` does the same in several calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import native
from kernels.cpu_activation import CpuGrid
from kernels.cpu_weight import CpuWeight
from kernels.norms import GroupNorm

_FLOATS = (torch.float32, torch.bfloat16)


class SmallCalls:
    """The calls of one layer, by shape of input; of one step each.

    Parameters
    ----------
    weight : CpuWeight
        With a `small`.
    bias : Tensor, shape (N,), or None
    bits : int
        Of the codes.
    norm : GroupNorm, optional
        To normalize with before SiLU, which comes before quantization then; its tensors in float32.
    """

    def __init__(self, weight: CpuWeight, bias: Tensor | None, bits: int, norm: GroupNorm | None = None) -> None:
        assert weight.small is not None
        self.weight, self.small, self.bits, self.norm = weight, weight.small, bits, norm
        self.given_bias = bias
        self.bias = native.pad_bias(bias, weight.small)
        # Addresses of these tensors are in the plans.
        self._plans: dict[Any, tuple[bytes, tuple[int, ...]] | None] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> SmallCalls:
        """Share the weights, which nothing writes to; prepare calls anew."""
        twin = SmallCalls(self.weight, self.given_bias, self.bits, self.norm)
        memo[id(self)] = twin
        return twin

    def __call__(self, x: Tensor, grid: CpuGrid, residual: Tensor | None) -> Tensor | None:
        """Return the layer's output, dtype of `x`; None where it is not small, or not laid out as the call reads it.

        Parameters
        ----------
        x : Tensor, shape (..., C), or (B, H, W, C) for a convolution
        grid : CpuGrid
            Of one run.
        residual : Tensor, shape of the output, or None
        """
        if residual is not None and (residual.dtype is not x.dtype or not residual.is_contiguous()):
            return None
        if x.stride(-1) != 1:
            x = x.contiguous()
        key = (x.shape, x.stride(), x.dtype, torch.get_num_threads())
        plan = self._plans[key] if key in self._plans else self._prepare(key, x, grid)
        if plan is None:
            return None
        fixed, shape = plan
        out = torch.empty(shape, dtype=x.dtype)
        native.run_layer(fixed, x, out, residual, grid)
        return out

    def _prepare(self, key: Any, x: Tensor, grid: CpuGrid) -> tuple[bytes, tuple[int, ...]] | None:
        """Prepare the call for inputs like `x`."""
        geometry = self.weight.geometry or native.POINT
        plan = None
        if x.dtype in _FLOATS and x.shape[-1] == self.weight.channels and x.numel() and grid.scale.numel() == 1:
            shape = (*x.shape[:-1], self.small.outputs)
            if self.weight.geometry is not None:
                shape = (x.shape[0], *geometry.output_size(*x.shape[1:3]), self.small.outputs)
            work = self.small.values.numel()
            for size in shape[:-1]:
                work *= size
            if work <= self.weight.small_work:
                fixed = native.plan_layer(x, grid, self.bits, self.norm, self.small, self.bias, shape, geometry)
                plan = None if fixed is None else (fixed, shape)
        self._plans[key] = plan
        return plan
