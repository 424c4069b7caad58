from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels._triton.sums import row_sums, window_sums
from kernels.conv import ConvGeometry


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 7, 336), (3, 5000)])
def test_rows_are_added_up(shape: tuple[int, ...], device: str) -> None:
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8).to(device)
    assert torch.equal(row_sums(codes), codes.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3)])
def test_windows_are_added_up(kernel: tuple[int, int], device: str) -> None:
    sums = torch.randint(-9, 9, (2, 17, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
    geometry = ConvGeometry(kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    ones = torch.ones(1, 1, *kernel, dtype=torch.float64, device=device)
    want = F.conv2d(sums.double()[:, None], ones, padding=geometry.padding)[:, 0]
    assert torch.equal(window_sums(sums, geometry).double(), want)
