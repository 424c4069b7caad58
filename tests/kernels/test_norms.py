from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activations import ActivationTable, QuantizedActivation, quantize_by_table, quantize_dynamic
from kernels.errors import KernelError
from kernels.fp8 import Fp8Matrix, quantize_fp8, to_fp8
from kernels.norms import (
    NORM_CODE_SHARE,
    GroupNorm,
    LayerNorm,
    group_norm_quantize,
    layer_norm_quantize,
    layer_norm_quantize_fp8,
)

BACKENDS = ("reference", "triton")
TABLE = ActivationTable(torch.tensor([0.02, 0.05]), torch.tensor([60.0, 128.0]), 8)


def near(got: QuantizedActivation, want: QuantizedActivation) -> None:
    """The codes of equal values, but for what float32 leaves open."""
    off = (got.codes.cpu().int() - want.codes.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) <= NORM_CODE_SHARE
    assert torch.allclose(got.scale.cpu(), want.scale, rtol=1e-5)
    assert torch.equal(got.zero_point.cpu(), want.zero_point)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def on(device: str) -> ActivationTable:
    return ActivationTable(TABLE.scale.to(device), TABLE.zero_point.to(device), 8)


@pytest.mark.parametrize(("shape", "groups"), [((1, 1, 1, 6), 3), ((2, 13, 7, 40), 8), ((3, 2100, 12), 2)])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(shape: tuple[int, ...], groups: int, silu: bool, affine: bool, device: str) -> None:
    x = noise(*shape) * 3 + 10  # a mean that sums of squares would lose digits to
    weight, bias = (noise(shape[-1]), noise(shape[-1])) if affine else (None, None)
    y = F.group_norm(x.movedim(-1, 1), groups, weight, bias, eps=1e-5).movedim(1, -1)
    index = torch.arange(shape[0]) % 2
    want = quantize_by_table((F.silu(y) if silu else y).contiguous(), TABLE, index, "reference")
    affine_there = [None if t is None else t.to(device) for t in (weight, bias)]
    norm = GroupNorm(groups, 1e-5, *affine_there)
    for backend in BACKENDS:
        near(group_norm_quantize(x.to(device), norm, on(device), index.to(device), silu=silu, backend=backend), want)


def test_group_norm_of_channels_with_divisors(device: str) -> None:
    x, index = noise(2, 3, 4, 40) * 3, torch.tensor([1, 0])
    divisor = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    divisor[1, 7] = torch.inf
    table = ActivationTable(TABLE.scale, TABLE.zero_point, 8, divisor=divisor)
    there = ActivationTable(TABLE.scale.to(device), TABLE.zero_point.to(device), 8, divisor=divisor.to(device))
    want = quantize_by_table(F.silu(F.group_norm(x.movedim(-1, 1), 8)).movedim(1, -1), table, index, "reference")
    for backend in BACKENDS:
        near(group_norm_quantize(x.to(device), GroupNorm(8, 1e-5), there, index.to(device), backend=backend), want)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 7, 63), (3, 4, 1000)])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_layer_norm(shape: tuple[int, ...], modulated: bool, dynamic: bool, device: str) -> None:
    x, channels = noise(*shape) * 3 + 1, shape[-1]
    scale, shift = (noise(shape[0], channels), noise(shape[0], channels + 1)[:, 1:]) if modulated else (None, None)
    y = F.layer_norm(x, (channels,), eps=1e-6)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, None]) + shift[:, None]
    index = torch.arange(shape[0]) % 2
    if dynamic:
        want = quantize_dynamic(y, 8, symmetric=False, per_token=True, backend="reference")
    else:
        want = quantize_by_table(y, TABLE, index, "reference")
    multiplier = None if scale is None else 1 + scale.to(device)
    norm = LayerNorm(1e-6, multiplier=multiplier, shift=None if shift is None else shift.to(device))
    for backend in BACKENDS:
        grid = 8 if dynamic else on(device)
        steps = None if dynamic else index.to(device)
        near(layer_norm_quantize(x.to(device), norm, grid, steps, backend=backend), want)


@pytest.mark.parametrize("shape", [(1, 1, 6), (3, 5, 1152)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_layer_norm_to_fp8(shape: tuple[int, ...], dynamic: bool, device: str) -> None:
    x, channels = noise(*shape) * 3 + 1, shape[-1]
    multiplier, shift = 1 + noise(shape[0], channels), noise(shape[0], channels + 1)[:, 1:]
    index, scale = torch.arange(shape[0]) % 2, torch.tensor([0.01, 0.02])
    y = F.layer_norm(x, (channels,), eps=1e-6) * multiplier[:, None] + shift[:, None]
    rows = scale[index].repeat_interleave(shape[1])
    want = quantize_fp8(y, "reference") if dynamic else Fp8Matrix(to_fp8(y, rows.view(*shape[:2], 1)), rows)
    norm = LayerNorm(1e-6, multiplier=multiplier.to(device), shift=shift.to(device))
    grid = (None, None) if dynamic else (scale.to(device), index.to(device))
    for backend in BACKENDS:
        got = layer_norm_quantize_fp8(x.to(device), norm, *grid, backend=backend)
        assert torch.allclose(got.scale.cpu(), want.scale, rtol=1e-5)
        off = got.values.cpu().float() != want.values.float()
        assert float(off.float().mean()) <= NORM_CODE_SHARE
        assert torch.allclose(got.values.cpu().float(), want.values.float(), rtol=2.0**-3, atol=2.0**-9)
    with pytest.raises(KernelError, match="got an empty tensor"):
        layer_norm_quantize_fp8(x[:0].to(device), LayerNorm(1e-6))


def test_an_affine_layer_norm_of_strided_rows(device: str) -> None:
    x = noise(4, 90)[:, 5:70:2]
    weight, bias = noise(33), noise(33)
    want = quantize_by_table(F.layer_norm(x, (33,), weight, bias), TABLE, torch.tensor(1), "reference")
    norm = LayerNorm(1e-5, weight.to(device), bias.to(device))
    for backend in BACKENDS:
        near(layer_norm_quantize(x.to(device), norm, on(device), torch.tensor(1, device=device), backend=backend), want)


# The interpreter is numpy, which warns of what a GPU does silently.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tokens_own_grid_may_be_symmetric_and_shows_what_is_not_finite(symmetric: bool, device: str) -> None:
    x = noise(2, 3, 40)
    want = quantize_dynamic(F.layer_norm(x, (40,)), 8, symmetric=symmetric, per_token=True, backend="reference")
    x[1, 2, 7] = torch.inf
    for backend in BACKENDS:
        got = layer_norm_quantize(x.to(device), LayerNorm(1e-5), 8, symmetric=symmetric, backend=backend)
        assert got.scale.isfinite().tolist() == [True] * 5 + [False], backend
        assert torch.allclose(got.scale.cpu()[:5], want.scale[:5], rtol=1e-5)
        assert torch.equal(got.zero_point.cpu()[:5], want.zero_point[:5])
        assert int((got.codes.cpu().int() - want.codes.int()).flatten(0, 1)[:5].abs().max()) <= 1


def test_weights_of_norms_may_be_strided_and_batches_empty(device: str) -> None:
    x, index = noise(2, 5, 40) * 3, torch.tensor([1, 0])
    weight, bias = noise(80)[::2], noise(120)[::3]
    group = quantize_by_table(
        F.group_norm(x.movedim(-1, 1), 8, weight, bias).movedim(1, -1).contiguous(), TABLE, index, "reference"
    )
    layer = quantize_by_table(F.layer_norm(x, (40,), weight, bias), TABLE, index, "reference")
    there = (weight.to(device), bias.to(device))
    for backend in BACKENDS:
        options = {"index": index.to(device), "backend": backend}
        near(group_norm_quantize(x.to(device), GroupNorm(8, 1e-5, *there), on(device), silu=False, **options), group)
        near(layer_norm_quantize(x.to(device), LayerNorm(1e-5, *there), on(device), **options), layer)
        none = x[:0].to(device)
        one = ActivationTable(TABLE.scale[:1].to(device), TABLE.zero_point[:1].to(device), 8)
        assert group_norm_quantize(none, GroupNorm(8, 1e-5), one, backend=backend).codes.shape == (0, 5, 40)
        assert layer_norm_quantize(none, LayerNorm(1e-5), one, backend=backend).codes.shape == (0, 5, 40)


def test_what_does_not_fit_is_refused() -> None:
    x, index = torch.zeros(2, 4, 6), torch.tensor([0, 1])
    with pytest.raises(KernelError, match="got 6 channels in 4 groups"):
        group_norm_quantize(x, GroupNorm(4, 1e-5), TABLE, index)
    with pytest.raises(KernelError, match=r"activation table: got \(2,\) scales"):
        group_norm_quantize(x, GroupNorm(3, 1e-5), TABLE)
    with pytest.raises(KernelError, match="modulation multiplier: got"):
        layer_norm_quantize(x, LayerNorm(1e-5, multiplier=torch.zeros(2, 6)), TABLE, index)
    scaled = ActivationTable(torch.ones(1), torch.zeros(1), 8, divisor=torch.ones(1, 6))
    with pytest.raises(KernelError, match="wanted one without"):
        layer_norm_quantize(x, LayerNorm(1e-5), scaled)
    with pytest.raises(KernelError, match=r"wanted \(6,\)"):
        layer_norm_quantize(x, LayerNorm(1e-5, torch.ones(7)), 8)
    with pytest.raises(KernelError, match="activation bits: got 9, wanted 2 to 8"):
        layer_norm_quantize(x, LayerNorm(1e-5), 9)
    with pytest.raises(KernelError, match="got an empty tensor"):
        layer_norm_quantize(x[:0], LayerNorm(1e-5), 8)
    with pytest.raises(KernelError, match="wanted at most 16384"):
        layer_norm_quantize(torch.zeros(1, 16385), LayerNorm(1e-5), 8)
