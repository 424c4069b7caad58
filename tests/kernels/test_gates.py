from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import ActivationTable, quantize_by_table
from kernels.errors import KernelError
from kernels.fp8 import quantize_fp8
from kernels.gates import MAX_GATED, Gate, gate_quantize, gate_quantize_fp8
from kernels.norms import NORM_CODE_SHARE
from tests.kernels.test_norms import BACKENDS, TABLE, near, noise, on


def activated(x: Tensor, gate: Gate) -> Tensor:
    """As diffusers' feed-forward has it."""
    if gate is Gate.GEGLU:
        hidden, gating = x.chunk(2, dim=-1)
        return hidden * F.gelu(gating)
    return F.gelu(x, approximate="tanh" if gate is Gate.GELU_TANH else "none")


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 126), (3, 40, 1000)])
def test_gates(gate: Gate, shape: tuple[int, ...], device: str) -> None:
    x, index = noise(*shape) * 4, torch.arange(shape[0]) % 2
    x[0, 0, 0], x[0, 0, -1] = -1000.0, 1000.0
    want = quantize_by_table(activated(x, gate), TABLE, index, "reference")
    for backend in BACKENDS:
        got = gate_quantize(x.to(device), gate, on(device), index.to(device), backend=backend)
        assert got.codes.shape == (*shape[:-1], shape[-1] // gate.inputs)
        near(got, want)


@pytest.mark.parametrize("gate", [Gate.GELU, Gate.GEGLU])
def test_channels_with_divisors_and_rows_apart(gate: Gate, device: str) -> None:
    channels = 40 * gate.inputs
    divisor = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    x, index = noise(2, 9, channels + 8)[..., :channels], torch.tensor([1, 0])
    table = ActivationTable(TABLE.scale, TABLE.zero_point, 8, divisor=divisor)
    there = ActivationTable(TABLE.scale.to(device), TABLE.zero_point.to(device), 8, divisor=divisor.to(device))
    want = quantize_by_table(activated(x, gate), table, index, "reference")
    for backend in BACKENDS:
        near(gate_quantize(x.to(device), gate, there, index.to(device), backend=backend), want)


@pytest.mark.parametrize("gate", Gate)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 126), (3, 5, 1280), (2, 3, 5122)])
def test_gates_in_fp8_have_scales_of_tokens(gate: Gate, shape: tuple[int, ...], device: str) -> None:
    x = noise(*shape) * 4
    x[0, 0, 0], x[0, 0, -1] = -1000.0, 1000.0
    want = quantize_fp8(activated(x, gate), "reference")
    for backend in BACKENDS:
        got = gate_quantize_fp8(x.to(device), gate, backend=backend)
        assert got.values.shape == (*shape[:-1], shape[-1] // gate.inputs)
        assert torch.allclose(got.scale.cpu(), want.scale, rtol=1e-5)
        values, wanted = got.values.cpu().float(), want.values.float()
        assert int((values != wanted).sum()) <= 1 + NORM_CODE_SHARE * wanted.numel()
        assert torch.allclose(values, wanted, rtol=0.125, atol=2.0**-9)  # the next number at most


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match="wanted 1 to 16384 channels of a token"):
        gate_quantize_fp8(torch.zeros(1, MAX_GATED + 1), Gate.GELU)
    with pytest.raises(KernelError, match="wanted 1 to 16384 channels of a token"):
        gate_quantize_fp8(torch.zeros(0, 8), Gate.GELU)
    with pytest.raises(KernelError, match="geglu: got 7 channels, wanted two halves"):
        gate_quantize(torch.zeros(2, 7), Gate.GEGLU, ActivationTable(torch.ones(1), torch.zeros(1), 8))
    table = ActivationTable(torch.ones(1), torch.zeros(1), 8, divisor=torch.ones(1, 8))
    with pytest.raises(KernelError, match="divisor: got shape"):
        gate_quantize(torch.zeros(2, 8), Gate.GEGLU, table)
