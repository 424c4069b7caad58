from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from quant_core.nn.straight_through import FakeQuantize

TOP = 7


@pytest.fixture
def x() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 60, generator=draw) * 1.5


def run(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return FakeQuantize.apply(x, scale, zero, TOP)


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 60)])
def test_the_forward_is_that_of_the_kernels_bit_for_bit(x: Tensor, shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.2
    zero = torch.full(shape, 3.0)
    assert torch.equal(run(x, scale, zero), fake_quantize_affine(x, scale, zero, 0, TOP))


def test_the_inputs_gradient_passes_inside_and_stops_outside() -> None:
    # scale 0.5, zero point 3, codes 0..7: values from -1.5 - half a step to 2 + half a step keep theirs
    x = torch.tensor([-9.0, -1.8, -1.7, -1.5, 0.0, 0.3, 2.0, 2.2, 2.3, 9.0], requires_grad=True)
    upstream = torch.arange(1.0, 11.0)
    run(x, torch.tensor(0.5), torch.tensor(3.0)).backward(upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 0, 0]


def test_the_scales_gradient_of_hand() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([0.3, -0.2, 9.0, -9.0])
    run(x, scale, torch.tensor(3.0)).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    # inside: round(x / s) - x / s = 1 - 0.6 and 0 + 0.4; outside: code - zero point = 4 and -3
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(0.4 + 10 * 0.4 + 100 * 4 - 1000 * 3)


def test_the_scales_gradient_where_everything_is_clipped_is_the_true_one() -> None:
    # Far outside, rounding plays no part and finite differences hold: x_hat = (code - zero) s.
    x, zero = torch.tensor([50.0, -50.0, 70.0]), torch.tensor(3.0)
    scale = torch.tensor(0.5, requires_grad=True)
    run(x, scale, zero).square().sum().backward()
    step = 1e-2
    high, low = (run(x, torch.tensor(0.5 + d), zero).square().sum() for d in (step, -step))
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(float(high - low) / (2 * step), rel=1e-4)


def test_the_scales_gradient_inside_is_the_true_one_of_the_straight_through_surrogate(x: Tensor) -> None:
    # With the rounding offset r = round(x/s) - x/s held fixed, x_hat = (x/s + r) s inside, so d x_hat / ds = r.
    scale = torch.tensor(0.7, requires_grad=True)
    zero, upstream = torch.tensor(4.0), torch.randn(4, 60, generator=torch.Generator().manual_seed(2))
    run(x, scale, zero).backward(upstream)
    offset = (torch.round(x / 0.7) - x / 0.7).double()

    def surrogate(s: float) -> Tensor:
        codes = torch.round(x / 0.7) + 4
        inside = (codes >= 0) & (codes <= TOP)
        moved = torch.where(inside, x.double() + offset * s, (codes.clamp(0, TOP) - 4).double() * s)
        return (moved * upstream).sum()

    assert scale.grad is not None
    slope = float(surrogate(0.8) - surrogate(0.6)) / 0.2
    assert scale.grad.item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 60)])
def test_the_scales_gradient_has_its_shape(x: Tensor, shape: tuple[int, ...]) -> None:
    scale = torch.full(shape, 0.7, requires_grad=True)
    whole = torch.full((4, 60), 0.7, requires_grad=True)
    for each in (scale, whole):
        run(x, each, torch.full(shape, 4.0)).square().sum().backward()
    assert scale.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(scale.grad, whole.grad.sum_to_size(shape))


def test_no_gradient_where_none_is_wanted(x: Tensor) -> None:
    x.requires_grad_()
    scale = torch.tensor(0.5)
    run(x, scale, torch.tensor(3.0)).sum().backward()
    assert scale.grad is None
