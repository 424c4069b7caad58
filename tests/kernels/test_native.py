"""The compiled part of the CPU backend against plain torch."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.activations import ActivationTable
from kernels.cpu_activation import CpuActivation, cpu_grid, quantize_cpu
from kernels.errors import KernelError
from kernels.norms import NORM_CODE_SHARE, GroupNorm

HEADERS = Path(sysconfig.get_paths()["include"], "Python.h")
can_build = shutil.which("cc") is not None and HEADERS.is_file()
needs_native = pytest.mark.skipif(not native.is_built(), reason="this installation has no compiled part")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def table(channels: int | None = None) -> ActivationTable:
    divisor = None
    if channels is not None:
        divisor = torch.rand(2, channels, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
        divisor[1, channels // 2] = torch.inf
    return ActivationTable(torch.tensor([0.02, 0.05]), torch.tensor([60.0, 131.0]), 8, divisor=divisor)


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
    grids: ActivationTable,
    index: Tensor,
    padding: tuple[int, int] = (0, 0),
    norm: GroupNorm | None = None,
    silu: bool = False,
) -> tuple[CpuActivation, CpuActivation]:
    """Quantize with and without the compiled part."""

    def run() -> CpuActivation:
        grid = cpu_grid(grids, index)
        return quantize_cpu(x, grid, 8, with_sums=True, padding=padding, norm=norm, silu=silu)

    got = run()
    with monkeypatch.context() as patch:
        patch.setattr(native, "_native", None)
        return got, run()


@pytest.mark.skipif(not can_build, reason="no C compiler, or no headers of Python")
def test_it_is_built_where_it_can_be() -> None:
    assert native.is_built()


@needs_native
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 40), (1, 3, 5, 6), (2, 9, 4, 48), (2, 2, 2, 4100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.tensor(1), torch.arange(3) % 2], ids=["one", "mixed"])
def test_codes_are_those_of_torch(
    shape: tuple[int, ...], dtype: torch.dtype, index: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index[: shape[0]] if index.dim() else index
    x = (noise(*shape) * 5).to(dtype)
    x.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, 1e30]).to(dtype)
    for grids in (table(), table(shape[-1])):
        padding = (2, 1) if len(shape) == 4 else (0, 0)
        got, want = both_ways(monkeypatch, x, grids, index, padding)
        off = got.codes != want.codes
        assert not bool(off.view(-1)[3:].any() if padding == (0, 0) else off.flatten(1, -2)[..., 3:].any())
        inner = got.codes if padding == (0, 0) else got.codes[:, 2:-2, 1:-1]
        zero = got.zero_point.float().view(-1, *(1,) * (len(shape) - 1))
        assert got.sums is not None
        assert torch.equal(got.sums, (inner.float() - zero).sum(-1))


@needs_native
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 1, 6), 3), ((2, 13, 7, 40), 8), ((3, 40, 30, 12), 2), ((1, 2, 2, 4100), 4)], ids=str
)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_torch(
    shape: tuple[int, ...],
    groups: int,
    silu: bool,
    affine: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A mean that sums of squares would lose digits to; bfloat16 has so few values there that all round alike.
    x = (noise(*shape) * 3 + (10 if dtype is torch.float32 else 1)).to(dtype)
    weight, bias = (noise(shape[-1]), noise(shape[-1])) if affine else (None, None)
    norm = GroupNorm(groups, 1e-5, weight, bias)
    got, want = both_ways(monkeypatch, x, table(), torch.arange(shape[0]) % 2, (1, 2), norm, silu)
    assert got.codes.shape == want.codes.shape == (shape[0], shape[1] + 2, shape[2] + 4, shape[3])
    off = (got.codes.int() - want.codes.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) <= max(NORM_CODE_SHARE, 1.5 / off.numel())
    assert torch.equal(off[:, 0], torch.zeros_like(off[:, 0]))


@needs_native
def test_a_sigmoid_is_exact_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """x * sigmoid(x) over all of its range, at a step that shows a part in 2**20 of it."""
    x = torch.linspace(-200, 200, 4096).view(1, 64, 64, 1).repeat(1, 1, 1, 2)
    x[..., 1] = -x[..., 0]
    for step in (1.0, 1e-3):
        grids = ActivationTable(torch.tensor([step]), torch.tensor([128.0]), 8)
        norm = GroupNorm(1, 1e-5, torch.full((2,), float(x.std(correction=0))), torch.zeros(2))
        got, want = both_ways(monkeypatch, x, grids, torch.tensor(0), norm=norm, silu=True)
        assert float((got.codes != want.codes).float().mean()) <= NORM_CODE_SHARE


@needs_native
def test_slices_of_channels_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(2, 5, 6, 80)
    assert native._pitch(x[..., 16:64]) == 80
    for part in (x[..., 16:64], x[..., :48], x[:, 1:, :, :48], x.transpose(1, 2)[..., :48], x.movedim(-1, 1)):
        norm = GroupNorm(2, 1e-5)
        for given in (None, norm):
            got, want = both_ways(monkeypatch, part, table(), torch.tensor([0, 1]), (1, 1), given, given is not None)
            assert float((got.codes != want.codes).float().mean()) <= (0.0 if given is None else NORM_CODE_SHARE)


@needs_native
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_share_the_work(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(batch, 50, 30, 96)
    norm, threads = GroupNorm(8, 1e-5), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        got, want = both_ways(monkeypatch, x, table(), torch.tensor(1), (1, 1), norm, True)
    finally:
        torch.set_num_threads(threads)
    assert float((got.codes != want.codes).float().mean()) <= NORM_CODE_SHARE
    assert got.sums is not None
    assert torch.equal(got.sums, (got.codes[:, 1:-1, 1:-1].float() - 131).sum(-1))


@needs_native
def test_what_would_be_read_beyond_its_end_is_refused() -> None:
    x, step, zero = noise(2, 3, 4, 8), torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def run(step: Tensor = step, zero: Tensor = zero, norm: GroupNorm | None = None) -> None:
        native.quantize(x, step, zero, 8, with_sums=False, padding=(1, 1), norm=norm, silu=False)

    run()
    with pytest.raises(KernelError, match="got 1 zero points and 5 steps"):
        run(torch.ones(5))
    with pytest.raises(KernelError, match="wanted a number that divides 6 rows"):
        run(torch.ones(4), zero.repeat(4))
    with pytest.raises(KernelError, match=r"got torch\.float64 and torch\.int32"):
        run(step.double())
    with pytest.raises(KernelError, match=r"wanted float32 \(8,\)"):
        run(norm=GroupNorm(2, 1e-5, torch.ones(7), torch.ones(8)))
    with pytest.raises(KernelError, match=r"image: got shape \(2, 0, 4, 8\), wanted pixels"):
        native.quantize(x[:, :0], step, zero, 8, with_sums=False, padding=(1, 1), norm=None, silu=False)
    codes, sums = native.quantize(
        torch.zeros(2, 0), step, zero, 8, with_sums=True, padding=(0, 0), norm=None, silu=False
    )
    assert codes.shape == (2, 0)
    assert sums is not None
    assert sums.tolist() == [0.0, 0.0]
    with pytest.raises(KernelError, match="got 3 groups"):
        run(norm=GroupNorm(3, 1e-5))
