"""Differences to what is held: the compiled part, tensor operations and the definition agree bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.activations import ActivationTable
from kernels.affine import quantize_affine
from kernels.cpu_activation import CpuActivation, cpu_grid, interior, quantize_cpu
from kernels.differences import Held
from kernels.errors import KernelError
from kernels.norms import GroupNorm

SHAPES = [(2, 5, 7, 3), (3, 8, 8, 16), (1, 1, 1, 2100), (63, 1), (4, 9, 33)]
BITS = 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def table(channels: int, *, scaled: bool) -> ActivationTable:
    scale = torch.tensor([0.11])
    divisor = scale[:, None] * (0.5 + torch.arange(channels) % 7 / 3) if scaled else None
    return ActivationTable(scale, torch.tensor([7.0]), BITS, divisor=divisor)


def advance(x: Tensor, held: Held, *, scaled: bool, **how: object) -> CpuActivation:
    return quantize_cpu(x, cpu_grid(table(x.shape[-1], scaled=scaled)), BITS, held=held, **how)  # type: ignore[arg-type]


def restore(channels: int, *, scaled: bool) -> Tensor | None:
    return 0.5 + torch.arange(channels) % 7 / 3 if scaled else None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_codes_and_what_is_held_are_those_of_the_definition(
    shape: tuple[int, ...], scaled: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and not native.is_built():
        pytest.skip("the compiled part is not there")
    monkeypatch.setattr(native, "is_usable", lambda: compiled)
    channels = shape[-1]
    factor = restore(channels, scaled=scaled)
    grid = table(channels, scaled=scaled)
    divisor = grid.scale if grid.divisor is None else grid.divisor[0]
    values = torch.full(shape, torch.nan)  # nothing of it may be read at first
    wanted = torch.zeros(shape)
    x = drawn(*shape)
    for step in range(4):
        x = x + 0.1 * drawn(*shape)
        padding = (1, 2) if len(shape) == 4 else (0, 0)
        held = Held(values, grid.scale, factor, is_first=step == 0)
        found = advance(x, held, scaled=scaled, padding=padding, with_sums=True)
        codes = quantize_affine(x - wanted, divisor, torch.tensor(7.0), 0, 2**BITS - 1)
        value = (codes.float() - 7.0) * grid.scale
        wanted = wanted + (value if factor is None else value * factor)
        assert torch.equal(interior(found.codes, padding), codes)
        assert torch.equal(values, wanted)
        assert found.sums is not None
        inner = found.sums if found.sums.shape == shape[:-1] else interior(found.sums[..., None], padding)[..., 0]
        assert torch.equal(inner.reshape(shape[:-1]), (codes.float() - 7).sum(-1))
        if padding != (0, 0):
            assert (found.codes[:, 0] == 7).all()
            assert (found.codes[:, :, :2] == 7).all()


@pytest.mark.parametrize("silu", [False, True])
def test_a_norm_in_front_changes_codes_by_rounding_only(silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.is_built():
        pytest.skip("the compiled part is not there")
    norm = GroupNorm(4, 1e-5, drawn(16) + 1, drawn(16))
    held = [torch.empty(2, 6, 6, 16) for _ in range(2)]
    x, scale = drawn(2, 6, 6, 16), torch.tensor([0.11])
    for step in range(3):
        x = x + 0.1 * drawn(2, 6, 6, 16)
        codes = []
        for values, compiled in zip(held, (True, False), strict=True):
            monkeypatch.setattr(native, "is_usable", lambda compiled=compiled: compiled)
            part = Held(values, scale, None, is_first=step == 0)
            codes.append(advance(x, part, scaled=False, norm=norm, silu=silu).codes.int())
        assert (codes[0] - codes[1]).abs().max() <= 1
        assert (codes[0] != codes[1]).float().mean() <= 2.0**-8
        held[1].copy_(held[0])


def test_what_does_not_fit_is_refused() -> None:
    x = drawn(2, 3, 4)
    for held in (
        Held(torch.empty(2, 3, 5), torch.ones(1)),
        Held(torch.empty(2, 3, 4, dtype=torch.float64), torch.ones(1)),
        Held(torch.empty(2, 4, 3).transpose(1, 2), torch.ones(1)),
        Held(torch.empty(2, 3, 4), torch.ones(2)),
        Held(torch.empty(2, 3, 4), torch.ones(1), torch.ones(3)),
    ):
        with pytest.raises(KernelError, match=r"held: got .*, wanted contiguous float32 of shape \(2, 3, 4\) with one"):
            advance(x, held, scaled=False)
