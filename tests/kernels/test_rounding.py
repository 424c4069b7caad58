"""The compiled rounding of columns: what tensor operations give, byte for byte, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import rounding
from kernels.errors import KernelError
from quant_core.fit.closed_form import factorize, round_closed_form
from quant_core.nn.ranges import QParams

pytestmark = pytest.mark.skipif(not rounding.is_built(), reason="this installation has no compiled part")


@pytest.mark.parametrize("bits", [4, torch.tensor([1, 2, 3, 4, 8] * 4)], ids=["alike", "of each row"])
@pytest.mark.parametrize(("columns", "groups"), [(5, 1), (128, 4), (300, 3)])
def test_codes_are_those_of_tensor_operations(
    columns: int, groups: int, bits: int | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20, columns), torch.randn(4 * columns, columns)
    factor = factorize(x.T @ x / len(x), 0.03)
    grid = QParams(torch.rand(20, groups) / 5 + 0.2, torch.randint(0, 9, (20, groups)).float())
    index = torch.arange(columns) * groups // columns
    found = round_closed_form(weight, factor, grid, bits, index)
    monkeypatch.setattr(rounding, "_rounding", None)
    assert torch.equal(found, round_closed_form(weight, factor, grid, bits, index))
    assert len(found.unique()) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told | {"weight": told["weight"].double()}, r"weight: got torch\.float64"),
        (lambda told: told | {"scale": torch.ones(3, 4).T.contiguous().T}, r"scale: got torch\.float32"),
        (lambda told: told | {"top": torch.ones(4)}, r"top: got torch\.float32 \(4,\) on cpu, wanted contiguous"),
        (lambda told: told | {"stop": 5}, r"columns: got 0 to 5, wanted some of 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor | int]], dict[str, Tensor | int]], message: str
) -> None:
    told: dict[str, Tensor | int] = {
        "weight": torch.ones(3, 4), "numbers": torch.ones(3, 4), "inverse": torch.eye(4), "scale": torch.ones(3, 4),
        "zero_point": torch.zeros(3, 4), "top": torch.ones(3), "start": 0, "stop": 4,
    }  # fmt: skip
    with pytest.raises(KernelError, match=message):
        rounding.round_columns(**change(told))
