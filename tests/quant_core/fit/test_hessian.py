from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quant_core.fit.hessian import SecondMoment, input_rows
from quant_core.nn.layers import weight_matrix

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 5, bias=False), (3, 6)),
    "tokens": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "image tokens": (nn.Linear(6, 5, bias=False), (3, 2, 2, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, padding=1, stride=2, bias=False), (3, 6, 9)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), bias=False), (3, 6, 7, 8)),
    "same": (nn.Conv2d(6, 4, (3, 2), padding="same", dilation=2, bias=False), (3, 6, 7, 8)),
    "valid": (nn.Conv2d(6, 4, 3, padding="valid", bias=False), (3, 6, 7, 8)),
    "circular": (nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="circular", bias=False), (3, 6, 7, 8)),
    "conv3d": (nn.Conv3d(6, 4, (1, 3, 2), dilation=(1, 2, 1), padding=1, bias=False), (3, 6, 2, 7, 8)),
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outputs(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output as (B, positions, C_out)."""
    with torch.no_grad():
        y: Tensor = layer(x)
    y = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    return y.reshape(len(x), -1, y.shape[-1])


@pytest.mark.parametrize("kind", list(LAYERS))
def test_rows_times_the_weight_matrix_are_the_output(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x, matrix = random(*shape), weight_matrix(layer.get_parameter("weight").detach())
    rows = input_rows(layer, x, None, torch.Generator())
    assert rows.dtype is torch.float32
    torch.testing.assert_close(rows @ matrix.T, outputs(layer, x).flatten(0, 1))


@pytest.mark.parametrize("kind", list(LAYERS))
def test_drawn_rows_are_the_same_positions_of_every_sample(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x, matrix = random(*shape), weight_matrix(layer.get_parameter("weight").detach())
    wanted = outputs(layer, x)
    positions = min(3, wanted.shape[1])
    rows, again, other = (
        input_rows(layer, x, 3, torch.Generator().manual_seed(seed)).reshape(3, positions, -1) for seed in (1, 1, 4)
    )
    got = rows @ matrix.T
    assert torch.equal(rows, again)
    assert (positions < wanted.shape[1]) is not torch.equal(rows, other)
    found = {
        int((wanted[0] - got[0, place]).abs().sum(1).argmin()) for place in range(positions)
    }  # which positions they are
    assert len(found) == positions
    for place in range(positions):
        at = int((wanted[0] - got[0, place]).abs().sum(1).argmin())
        torch.testing.assert_close(got[:, place], wanted[:, at])


def test_second_moment_is_x_transposed_x() -> None:
    rows = random(100, 7)
    moment = SecondMoment(7)
    for part in rows.split([30, 0, 45, 25]):
        moment.update(part)
    assert moment.rows == 100
    torch.testing.assert_close(moment.mean(), rows.T @ rows / 100)
    torch.testing.assert_close(moment.mean_row(), rows.mean(dim=0))
    torch.testing.assert_close(moment.covariance(), torch.cov(rows.T, correction=0))
    assert torch.equal(SecondMoment(2).mean(), torch.zeros(2, 2))


def test_second_moment_of_many_columns_is_symmetric_and_whole() -> None:
    rows = random(40, 1100)  # more columns than are summed together
    moment = SecondMoment(1100)
    moment.update(rows)
    found = moment.mean()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, rows.T @ rows / 40)
