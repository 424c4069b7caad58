from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.affine import fake_quantize_affine
from quant_core.nn.activation import ActivationQuantizer, dynamic_qparams
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_hand(x: Tensor, low: float, high: float, top: int) -> Tensor:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor((high - low) / top, dtype=torch.float32)
    zero = torch.round(torch.tensor(-low, dtype=torch.float32) / scale)
    return ((torch.round(x / scale) + zero).clamp(0, top) - zero) * scale


def test_per_step_uses_each_samples_own_entry() -> None:
    clock = StepClock((9, 5, 1))
    quantizer = ActivationQuantizer(ActivationSpec(4), clock)
    scale, zero = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([8.0, 7.0, 0.0])
    quantizer.set_qparams(QParams(scale, zero))
    x = random(3, 2, 4)
    clock.set_timestep(torch.tensor([1, 9, 1]))
    with torch.no_grad():
        got = quantizer(x)
    for row, step in enumerate((2, 0, 2)):
        assert torch.equal(got[row], fake_quantize_affine(x[row], scale[step], zero[step], 0, 15))
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}


def test_static_has_one_entry() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(4, mode=ActivationMode.STATIC), StepClock((9, 5, 1)))
    assert quantizer.scale.shape == (1,)


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 7), (3, 2, 4, 5)])
@pytest.mark.parametrize("mode", ["dynamic_sample", "dynamic_token"])
def test_dynamic_equals_a_loop(shape: tuple[int, ...], mode: str) -> None:
    quantizer = ActivationQuantizer(ActivationSpec(4, mode=ActivationMode(mode)), StepClock((9, 5)))
    assert not quantizer.state_dict()
    x = random(*shape)
    with torch.no_grad():
        got = quantizer(x)
    per_token = mode == "dynamic_token" and len(shape) < 4
    rows, back = (t.reshape(-1, shape[-1]) if per_token else t.flatten(1) for t in (x, got))
    for row, result in zip(rows, back, strict=True):
        torch.testing.assert_close(result, by_hand(row, row.min().item(), row.max().item(), 15), rtol=1e-6, atol=1e-6)
    assert len(rows) == (x.numel() // shape[-1] if per_token else 3)


def test_dynamic_symmetric_has_a_fixed_zero_point() -> None:
    grid = dynamic_qparams(random(3, 7), ActivationSpec(4, symmetric=True, mode=ActivationMode.DYNAMIC_SAMPLE))
    assert grid.zero_point.flatten().tolist() == [8.0] * 3
    torch.testing.assert_close(grid.scale.flatten(), random(3, 7).abs().amax(1) / 7)


def test_gradient_or_not_gives_the_same_bits() -> None:
    for spec in (ActivationSpec(3, mode=ActivationMode.STATIC), ActivationSpec(3, mode=ActivationMode.DYNAMIC_TOKEN)):
        quantizer = ActivationQuantizer(spec, StepClock(()))
        if not spec.is_dynamic:
            quantizer.set_qparams(QParams(torch.tensor([0.37]), torch.tensor([3.0])))
        x = random(3, 7).requires_grad_()
        with torch.no_grad():
            plain = quantizer(x)
        learned = quantizer(x)
        assert torch.equal(plain, learned)
        assert not torch.equal(plain, x)
        assert learned.requires_grad


def test_soft_scale_stands_in_and_gets_its_gradient_by_step() -> None:
    clock = StepClock((9, 5, 1))
    quantizer = ActivationQuantizer(ActivationSpec(4), clock)
    quantizer.set_qparams(QParams(torch.full((3,), 0.1), torch.full((3,), 8.0)))
    clock.set_timestep(torch.tensor([9, 5]))
    x = random(2, 50)
    quantizer.soft_scale = torch.full((3,), 0.2, requires_grad=True)
    out = quantizer(x)
    assert torch.equal(out.detach(), fake_quantize_affine(x, torch.tensor(0.2), torch.tensor(8.0), 0, 15))
    out.square().sum().backward()
    gradient = quantizer.soft_scale.grad
    assert gradient is not None
    assert (gradient != 0).tolist() == [True, True, False]


def test_switched_off_it_does_nothing() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(2, mode=ActivationMode.DYNAMIC_SAMPLE), StepClock(()))
    quantizer.enabled = False
    x = random(2, 5)
    assert quantizer(x) is x


def test_half_precision_in_and_out() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE), StepClock(()))
    assert quantizer(random(2, 5).to(torch.bfloat16)).dtype is torch.bfloat16


def mixed_bits(clock: StepClock) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(ActivationSpec(8, step_bits=(4, 8, 6)), clock)
    quantizer.set_qparams(QParams(torch.tensor([0.3, 0.02, 0.08]), torch.tensor([8.0, 128.0, 32.0])))
    return quantizer


def test_bits_by_step_saturate_at_each_steps_greatest_code() -> None:
    clock = StepClock((9, 5, 1))
    quantizer, x = mixed_bits(clock), 10 * random(3, 50)
    tables = zip((9, 5, 1), (4, 8, 6), quantizer.scale, quantizer.zero_point, strict=True)
    for row, (timestep, bits, scale, zero_point) in enumerate(tables):
        clock.set_timestep(timestep)
        expected = fake_quantize_affine(x, scale, zero_point, 0, 2**bits - 1)
        assert torch.equal(quantizer(x), expected)
        clock.set_timestep(torch.tensor([9, 5, 1]))
        assert torch.equal(quantizer(x)[row], expected[row])
    # rows of one sample (heads, frames) are adjacent
    assert torch.equal(quantizer(x.repeat_interleave(2, 0)), quantizer(x).repeat_interleave(2, 0))


def test_bits_by_step_have_gradients_inside_their_own_range() -> None:
    clock = StepClock((9, 5, 1))
    quantizer = mixed_bits(clock)
    clock.set_timestep(torch.tensor([9, 5]))
    quantizer.soft_scale = quantizer.scale.clone().requires_grad_()
    x = torch.tensor([[2.0, 2.4, -2.56], [2.0, 2.4, -2.56]], requires_grad=True)
    out = quantizer(x)
    assert torch.equal(out.detach(), quantizer(x.detach()).detach())
    out.sum().backward()
    assert x.grad is not None
    # 15 - 8 = 7 steps of 0.3 up and 8 down; 127 steps of 0.02 up and 128 down
    assert x.grad.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_bits_by_step_must_be_those_of_the_trajectory() -> None:
    with pytest.raises(QuantizationError, match="got bits of 3 steps, wanted the trajectory's 2"):
        ActivationQuantizer(ActivationSpec(8, step_bits=(4, 8, 6)), StepClock((9, 5)))
