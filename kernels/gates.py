"""Apply the activation of a feed-forward and quantize in one go: GELU, or GEGLU's product with one.

What it saves is the activation's trip to memory and back: the projection's output is read once, and codes are written.
The codes agree with the reference's except where float32 rounding of the activation moves a value across the middle
between two codes; then they differ by one (`kernels.norms.NORM_CODE_SHARE` bounds how often).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import (
    ActivationTable,
    QuantizedActivation,
    check_divisor,
    quantize_by_table_reference,
    table_steps,
)
from kernels.backend import backend_for, is_traced
from kernels.errors import KernelError
from kernels.fp8 import Fp8Matrix, quantize_fp8_reference
from quant_spec.enums import KernelBackend

#: Channels of one token that a kernel keeps while it looks for their range.
MAX_GATED = 16384


class Gate(StrEnum):
    """What is quantized: GELU of a tensor, its approximation by tanh, or half of a tensor times GELU of the other."""

    GELU = "gelu"
    GELU_TANH = "gelu-tanh"
    GEGLU = "geglu"

    @property
    def inputs(self) -> int:
        """Channels that one channel of codes is made of."""
        return 2 if self is Gate.GEGLU else 1


def gate_quantize(
    x: Tensor,
    gate: Gate,
    table: ActivationTable,
    index: Tensor | None = None,
    *,
    backend: KernelBackend | str = KernelBackend.AUTO,
) -> QuantizedActivation:
    """Quantize gelu(x), or x[..., :C] * gelu(x[..., C:]), by a table.

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype; (B, ..., 2 C) for GEGLU
    gate : Gate
    table, index, backend
        As for `kernels.activations.quantize_by_table`, of C channels.

    Returns
    -------
    QuantizedActivation
        Codes of shape (B, ..., C).

    Raises
    ------
    KernelError
        If shapes disagree, GEGLU's channels are odd in number, or bits are not in 2..8.
    """
    channels = _gated_channels(x, gate)
    steps = table_steps(x[..., :channels], table, index)
    check_divisor(table, channels)
    quantize = _gate_quantize if is_traced(x) else _by_table
    codes, scale, zero = quantize(
        x, str(gate), table.scale, table.zero_point, steps, table.divisor, table.bits, str(backend)
    )
    return QuantizedActivation(codes, scale, zero, table.symmetric)


def gate_quantize_fp8(x: Tensor, gate: Gate, *, backend: KernelBackend | str = KernelBackend.AUTO) -> Fp8Matrix:
    """Convert gelu(x), or x[..., :C] * gelu(x[..., C:]), to E4M3, with a scale for each token.

    Parameters
    ----------
    x : Tensor, shape (B, ..., C), floating dtype, not empty; (B, ..., 2 C) for GEGLU; C at most 16384
    gate : Gate
    backend : KernelBackend

    Returns
    -------
    Fp8Matrix
        Of shape (B, ..., C).

    Raises
    ------
    KernelError
        If GEGLU's channels are odd in number, there are more than a kernel takes, or `x` is empty.
    """
    channels = _gated_channels(x, gate)
    if x.numel() == 0 or channels > MAX_GATED:
        raise KernelError(
            f"{gate}: got a tensor of shape {tuple(x.shape)}, wanted 1 to {MAX_GATED} channels of a token"
        )
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.gates import launch_gate_fp8

        with torch.cuda.device_of(x):
            return Fp8Matrix(*launch_gate_fp8(x, gate))
    return Fp8Matrix(*quantize_fp8_reference(gate_reference(x, gate)))


def _gated_channels(x: Tensor, gate: Gate) -> int:
    """Return how many channels a gate gives; refuse halves that are not equal."""
    if x.shape[-1] % gate.inputs:
        raise KernelError(f"{gate}: got {x.shape[-1]} channels, wanted two halves")
    return x.shape[-1] // gate.inputs


def gate_reference(x: Tensor, gate: Gate) -> Tensor:
    """Apply a gate in float32 with plain torch."""
    if gate is Gate.GEGLU:
        value, gating = x.float().chunk(2, dim=-1)
        return value * F.gelu(gating)
    return F.gelu(x.float(), approximate="tanh" if gate is Gate.GELU_TANH else "none")


def _by_table(
    x: Tensor,
    gate: str,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend_for(x.device, backend) is KernelBackend.TRITON:
        from kernels._triton.gates import launch_gate

        with torch.cuda.device_of(x):
            return launch_gate(x, gate, scale, zero_point, index, divisor, bits)
    return quantize_by_table_reference(gate_reference(x, Gate(gate)), scale, zero_point, index, divisor, bits)


_gate_quantize = torch.library.custom_op("quantmill::gate_quantize", _by_table, mutates_args=())


@_gate_quantize.register_fake
def _(
    x: Tensor,
    gate: str,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor | None,
    divisor: Tensor | None,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    runs = 1 if index is None else index.numel()
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] // Gate(gate).inputs, dtype=torch.int8)
    return codes, x.new_empty(runs, dtype=torch.float32), x.new_empty(runs, dtype=torch.int32)
