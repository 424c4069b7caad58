"""E4M3 numbers and low-rank branches in a layer: what they stand for, by formulas of their own; on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.fp8 import fake_quantize_fp8
from quant_core.fit.closed_form import factorize, round_closed_form_fp8
from quant_core.fit.layer_rounding import round_layer
from quant_core.nn.activation import ActivationQuantizer, Channels
from quant_core.nn.layers import Quantizable, QuantLayer
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime
from quant_spec.enums import ActivationMode, Granularity, KernelBackend, NumberType, RangeMethod
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec
from quant_spec.ranges import RangeSpec

E4M3 = NumberType.E4M3
W8F, A8F = WeightSpec(8, type=E4M3), ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN, type=E4M3)
STEPS = (900.0, 500.0, 100.0)


def e4m3(value: float) -> float:
    """The nearest number of 4 exponent and 3 mantissa bits, ties to even; too large ones are 448; by hand."""
    if math.isnan(value):
        return value
    size = min(abs(value), 448.0)
    power = max(math.floor(math.log2(size)), -6) if size else -6
    step = 2.0 ** (power - 3)
    return math.copysign(min(round(size / step) * step, 448.0), value)


def by_hand(x: Tensor) -> Tensor:
    return torch.tensor([e4m3(v) for v in x.flatten().tolist()]).reshape(x.shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(layer: Quantizable, spec: LayerSpec) -> tuple[nn.Sequential, QuantLayer, StepClock]:
    """A model of one layer, rounded to nearest, with a branch and tables where the format has them, at step 1."""
    clock = StepClock(STEPS)
    quantized = QuantLayer(layer.requires_grad_(False), spec, clock)
    for i, quantizer in enumerate(quantized.act_quantizers):
        if not quantizer.spec.is_dynamic:
            rows = len(quantizer.scale)
            quantizer.set_qparams(QuantizerTable.of(rows, i, quantizer.spec))
    if spec.channel_scale:
        quantized.set_channel_scale(random(layer.weight.shape[1], seed=5).exp())
    if spec.low_rank:
        quantized.set_branch(
            random(spec.low_rank, quantized.columns, seed=3) * 0.1, random(quantized.shape[0], spec.low_rank, seed=4)
        )
    round_layer(quantized, quantized.scaled(layer.weight.detach()), None, RangeSpec(), 0.01)
    clock.set_timestep(500.0)
    return nn.Sequential(quantized), quantized, clock


class QuantizerTable:
    """Tables that differ from step to step."""

    @staticmethod
    def of(rows: int, part: int, spec: ActivationSpec) -> QParams:
        if spec.is_float:
            return QParams(torch.linspace(0.002, 0.004 + 0.001 * part, rows), torch.zeros(rows))
        return QParams(torch.linspace(0.02, 0.05, rows), torch.full((rows,), 120.0))


def test_fake_quantization_is_e4m3_by_hand() -> None:
    x = torch.cat([random(400) * torch.logspace(-5, 4, 400), torch.tensor([0.0, -0.0, 17.0, 19.0, 464.0, 465.0])])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan, 2.0**-10, 3 * 2.0**-10])])
    scale = torch.tensor(0.5)
    got = fake_quantize_fp8(x * 0.5, scale)
    assert torch.equal(got[:-5], by_hand(x)[:-5] * 0.5)
    # infinities saturate, NaN stays, ties in the subnormals go to even
    assert got[-5:-3].tolist() == [224.0, -224.0]
    assert got[-3].isnan()
    assert got[-2:].tolist() == [0.0, 2.0**-9]


@pytest.mark.parametrize("mode", list(ActivationMode))
@torch.no_grad()
def test_activations_have_a_scale_for_each_token_sample_or_step(mode: ActivationMode) -> None:
    clock = StepClock(STEPS)
    quantizer = ActivationQuantizer(
        ActivationSpec(8, mode=mode, type=E4M3), clock, channels=Channels(4, -1, True, False)
    )
    quantizer.channel_scale.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    clock.set_timestep(500.0)
    x = random(2, 3, 4) * 5
    seen = x / quantizer.channel_scale
    if quantizer.spec.is_dynamic:
        dims = (2,) if mode is ActivationMode.DYNAMIC_TOKEN else (1, 2)
        scale = seen.abs().amax(dims, keepdim=True) / 448
    else:
        quantizer.set_qparams(QuantizerTable.of(len(quantizer.scale), 0, quantizer.spec))
        scale = quantizer.scale[len(quantizer.scale) // 2]
    assert torch.equal(quantizer(x), by_hand(x / (scale * quantizer.channel_scale)) * scale)


def test_a_row_that_is_not_finite_becomes_nan_where_its_scale_is_taken_of_it() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = math.inf
    with torch.no_grad():
        assert ActivationQuantizer(A8F, StepClock(()))(x).isnan().any(1).tolist() == [False, True, False]
        static = ActivationQuantizer(ActivationSpec(8, mode=ActivationMode.STATIC, type=E4M3), StepClock(()))
        assert static(x)[1].tolist() == [1.0, 1.0, 448.0, 1.0]


def test_gradients_pass_inside_the_range_alone() -> None:
    quantizer = ActivationQuantizer(ActivationSpec(8, mode=ActivationMode.STATIC, type=E4M3), StepClock(()))
    quantizer.soft_scale = torch.tensor([0.5], requires_grad=True)
    x = torch.tensor([[8.7, -500.0]], requires_grad=True)
    out = quantizer(x)
    assert out.tolist() == [[9.0, -224.0]]
    out.backward(torch.tensor([[1.0, 10.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0]]
    torch.testing.assert_close(quantizer.soft_scale.grad, torch.tensor([18.0 - 17.4 + 10 * -448.0]))


@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_TENSOR])
@torch.no_grad()
def test_a_layer_of_e4m3_numbers_is_its_formula(granularity: Granularity) -> None:
    layer = nn.Linear(20, 6)
    _, quantized, _ = made(layer, LayerSpec(WeightSpec(8, granularity=granularity, type=E4M3), A8F))
    weight = layer.weight.detach()
    most = weight.abs().amax(1, keepdim=True) if granularity is Granularity.PER_CHANNEL else weight.abs().amax()
    wanted = by_hand(weight / (most / 448)) * (most / 448)
    assert torch.equal(quantized.weight, wanted)
    assert quantized.qweight.dtype == torch.float8_e4m3fn
    assert "zero_point" not in dict(quantized.named_buffers())
    x = random(3, 20)
    scale = x.abs().amax(1, keepdim=True) / 448
    assert torch.equal(quantized(x), F.linear(by_hand(x / scale) * scale, wanted, layer.bias))


def test_closed_form_numbers_leave_less_error_than_the_nearest() -> None:
    weight, rows = random(16, 32), random(200, 32, seed=1) @ random(32, 32, seed=2)
    scale = (weight.abs().amax(1, keepdim=True) / 448).expand_as(weight)
    moment = rows.T @ rows / len(rows)
    closed = round_closed_form_fp8(weight, factorize(moment, 0.01), scale).float() * scale
    nearest = fake_quantize_fp8(weight, scale)
    errors = [float(((each - weight) @ moment * (each - weight)).sum()) for each in (closed, nearest)]
    assert errors[0] < 0.7 * errors[1]
    assert torch.equal(fake_quantize_fp8(closed, scale), closed)  # each is a number of the format


def test_searched_scales_are_no_worse() -> None:
    from quant_core.nn.ranges import choose_fp8_scale

    rows = random(4, 300)
    errors = []
    for method in (RangeMethod.MINMAX, RangeMethod.MSE):
        scale = choose_fp8_scale(rows, RangeSpec(method)).scale[:, None]
        errors.append(((fake_quantize_fp8(rows, scale) - rows).abs() ** 2.4).mean(1))
    assert bool((errors[1] <= errors[0]).all())


CASES: dict[str, tuple[Callable[[], Quantizable], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 12), (2, 5, 40)),
    "convolution": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 7, 6)),
    "pointwise": (lambda: nn.Conv2d(40, 12, 1), (2, 40, 4, 4)),
}


@pytest.mark.parametrize("split", [None, (24, 16)])
@pytest.mark.parametrize("case", ["linear", "convolution"])
@torch.no_grad()
def test_a_branch_reads_the_unquantized_input_and_codes_stand_for_what_is_left(
    case: str, split: tuple[int, int] | None
) -> None:
    make, shape = CASES[case]
    split = None if case == "convolution" and split else split
    spec = LayerSpec(
        WeightSpec(4), ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE), split, channel_scale=True, low_rank=3
    )
    layer = make()
    _, quantized, _ = made(layer, spec)
    down, up = quantized.low_rank_down.float(), quantized.low_rank_up.float()
    matrix = up @ down
    if layer.weight.dim() == 4:  # columns are taps, then channels
        matrix = matrix.reshape(12, 3, 3, 8).permute(0, 3, 1, 2)
    left = layer.weight - matrix
    channel_scale = torch.cat([q.channel_scale for q in quantized.act_quantizers]).view(1, -1, *(1,) * (len(shape) - 2))
    if layer.weight.dim() == 2:
        channel_scale = channel_scale.view(1, -1)
    torch.testing.assert_close(quantized.scaled(layer.weight), left * channel_scale)
    assert float((quantized.weight - left * channel_scale).norm() / (left * channel_scale).norm()) < 0.2
    x = random(*shape)
    want = F.linear(x, matrix) if len(shape) == 3 else F.conv2d(x, matrix, None, 2, 1)
    coded = quantized.quantize_input(x)
    want = want + (
        F.linear(coded, quantized.weight, layer.bias)
        if len(shape) == 3
        else F.conv2d(coded, quantized.weight, layer.bias, 2, 1)
    )
    torch.testing.assert_close(quantized(x), want, atol=1e-4, rtol=1e-4)
    # exported, it is one weight again
    whole = quantized.unscaled(quantized.weight)
    torch.testing.assert_close(whole, quantized.weight / channel_scale + matrix)


@pytest.mark.parametrize("backend", [KernelBackend.CPU, KernelBackend.TRITON])
@pytest.mark.parametrize("case", ["linear", "convolution"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # Triton's interpreter has no products of bfloat16
@torch.no_grad()
def test_a_branch_runs_on_each_backend(case: str, backend: KernelBackend, dtype: torch.dtype) -> None:
    make, shape = CASES[case]
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8, mode=ActivationMode.PER_STEP), channel_scale=True, low_rank=3)
    model, _, _ = made(make(), spec)
    x = random(*shape).to(dtype)
    want = model(x.float())
    (run,) = build_runtime(model, backend)
    assert run.backend is backend, run.reason
    assert "branch of rank 3" in run.reason
    got = model(x)
    assert got.dtype is dtype
    assert float((got.float() - want).abs().max() / want.abs().max()) < (2e-2 if dtype is torch.float16 else 2.0**-15)


@pytest.mark.parametrize("mode", list(ActivationMode))
@pytest.mark.parametrize("case", ["linear", "pointwise"])
@torch.no_grad()
def test_fp8_products_run_in_triton_with_the_references_numbers(case: str, mode: ActivationMode) -> None:
    make, shape = CASES[case]
    activation = ActivationSpec(8, mode=mode, type=E4M3)
    spec = LayerSpec(W8F, activation, (24, 16), channel_scale=mode is not ActivationMode.DYNAMIC_TOKEN, low_rank=2)
    model, _, _ = made(make(), spec)
    x = random(*shape)
    want = model(x)
    (run,) = build_runtime(model, KernelBackend.TRITON)
    assert run.backend is KernelBackend.TRITON, run.reason
    assert run.reason.startswith("FP8 weights in 480 bytes, FP8 products")
    # numbers are equal; sums of float32 are not in the same order (kernels.fp8.FP8_TOLERANCE of the terms)
    assert float((model(x) - want).abs().max() / want.abs().max()) < 2.0**-10


@pytest.mark.parametrize(
    ("layer", "spec", "reason"),
    [
        (nn.Conv2d(8, 4, 3), LayerSpec(W8F, A8F), "FP8 convolutions have no kernel"),
        (nn.Linear(8, 4), LayerSpec(W8F), "multiply E4M3 inputs with E4M3 weights"),
        (nn.Linear(8, 4), LayerSpec(WeightSpec(8), A8F), "multiply E4M3 inputs with E4M3 weights"),
    ],
)
def test_what_has_no_fp8_kernel_runs_the_reference_and_says_why(
    layer: Quantizable, spec: LayerSpec, reason: str
) -> None:
    for backend, wanted in ((KernelBackend.TRITON, reason), (KernelBackend.CPU, "oneDNN multiplies integers")):
        model, _, _ = made(layer, spec)
        (run,) = build_runtime(model, backend)
        assert run.backend is KernelBackend.REFERENCE
        assert wanted in run.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightSpec(4, type=E4M3),
        lambda: WeightSpec(8, granularity=Granularity.PER_GROUP, group_size=16, type=E4M3),
        lambda: ActivationSpec(4, type=E4M3),
        lambda: LayerSpec(WeightSpec(8), ActivationSpec(8, type=E4M3), channel_shift=True),
        lambda: LayerSpec(WeightSpec(8), low_rank=-1),
    ],
)
def test_formats_that_do_not_fit_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(QuantizationError, match=r"got .* wanted"):
        make()


def test_formats_say_themselves_in_json() -> None:
    spec = LayerSpec(W8F, A8F, low_rank=7)
    assert LayerSpec.from_json(spec.to_json()) == spec
    assert spec.to_json()["low_rank"] == 7
    plain = LayerSpec(WeightSpec(8), ActivationSpec(8)).to_json()
    assert "low_rank" not in plain
    assert "type" not in plain["weight"]
    assert "type" not in plain["activation"]
