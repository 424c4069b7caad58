"""A runtime layer in differences between steps: what changed is quantized, multiplied and added to the last output.

It computes what `QuantLayer` simulates (`quant_core.nn.differences`): the same codes, and A bit for bit where it reads
the same input; y, whose products are scaled in float32 and added as a residual is, differs by float rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu_activation import CpuActivation, interior, quantize_cpu
from kernels.cpu_weight import CpuWeight
from kernels.differences import Held, held_value
from kernels.epilogue import Epilogue, LowRank
from kernels.norms import group_norm_reference
from quant_spec.enums import KernelBackend

if TYPE_CHECKING:
    from quant_core.runtime.layer import RuntimeLayer


@torch.compiler.disable
def follow(
    layer: RuntimeLayer, rows: Tensor, residual: Tensor | None, low_rank: LowRank | None, dtype: torch.dtype
) -> Tensor:
    """Return a layer's output at the trajectory step that runs.

    Parameters
    ----------
    layer : RuntimeLayer
    rows : Tensor, shape (..., C), floating dtype
        Its input, channels last.
    residual : Tensor, shape of the output (..., N), optional
    low_rank : LowRank, optional
        Of the input itself, not of what changed.
    dtype : torch.dtype
        Of the output.

    Raises
    ------
    TrajectoryError
        If this step does not follow the last call of the layer, or the batch is another.
    """
    clock, memory = layer.clock, layer.memory
    assert clock is not None
    step = clock.moment[1]
    is_first = step not in layer.differences
    if is_first:
        held, kept = torch.empty(rows.shape, device=rows.device), None
    else:
        held, kept = memory.recall(clock, rows, layer.run.layer)
    if layer.run.backend is KernelBackend.CPU and len(layer.parts) == 1:
        out = _in_one_pass(layer, rows, held, kept, step)
    else:
        out = _by_parts(layer, _normalized(layer, rows).float(), held, kept)
    memory.keep(clock, held, out, for_next=step + 1 in layer.differences)
    if low_rank is not None:
        out = out + F.linear(low_rank.hidden, low_rank.up).float()
    # Never what is remembered itself: a model may write to what its layers give.
    return out.to(dtype, copy=True) if residual is None else (out + residual).to(dtype)


def _in_one_pass(layer: RuntimeLayer, rows: Tensor, held: Tensor, kept: Tensor | None, step: int) -> Tensor:
    """Take the difference, quantize it and hold what codes stand for while the input is read once; multiply."""
    (part,) = layer.parts
    assert isinstance(part.weight, CpuWeight)
    assert part.table is not None
    assert layer.activation is not None
    grid, widths = part.grids[0 if len(part.grids) == 1 else step], layer.activation.step_bits
    codes = quantize_cpu(
        rows,
        grid,
        widths[step] if widths else part.table.bits,
        with_sums=part.weight.correction is not None,
        padding=(0, 0) if layer.geometry is None else layer.geometry.padding,
        norm=layer.norm,
        silu=layer.norm is not None,
        held=Held(held, grid.scale, part.restore, is_first=kept is None),
    )
    return layer.product(codes, part, _epilogue(layer, kept, with_bias=kept is None))


def _by_parts(layer: RuntimeLayer, exact: Tensor, held: Tensor, kept: Tensor | None) -> Tensor:
    """Quantize and multiply what changed, part after part; hold what their codes stand for."""
    change, out = (exact, None) if kept is None else (exact - held, kept)
    if kept is None:
        held.zero_()
    for i, part in enumerate(layer.parts):
        codes = layer.codes(part.take(change), part)
        padding = codes.padding if isinstance(codes, CpuActivation) else (0, 0)
        value = held_value(interior(codes.codes, padding), codes.zero_point, codes.scale, part.restore)
        if part.channels is not None:
            held.index_add_(-1, part.channels, value)
        else:
            held[..., part.start : part.stop].add_(value)
        out = layer.product(codes, part, _epilogue(layer, out, with_bias=kept is None and i == 0))
    assert out is not None
    return out


def _epilogue(layer: RuntimeLayer, kept: Tensor | None, *, with_bias: bool) -> Epilogue:
    """Return what follows a product: the output of the step before, in float32."""
    return Epilogue(torch.float32, layer.bias if with_bias else None, kept)


def _normalized(layer: RuntimeLayer, rows: Tensor) -> Tensor:
    """Return rows as they are quantized: normalized, if the layer took the norm in front of it."""
    norm = layer.norm
    return rows if norm is None else group_norm_reference(rows, norm.groups, norm.weight, norm.bias, norm.eps, True)
