"""Layers whose input channels are scaled or shifted and whose output channels differ in bits, on integer backends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import Quantizable, QuantLayer
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime
from quant_core.runtime.layer import RuntimeLayer
from quant_core.runtime.parts import LayerPart
from quant_spec.enums import ActivationMode, Granularity, KernelBackend
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec, WeightSpec
from tests.quant_core.multiplied import multiplied, random_grid
from tests.quant_core.runtime.test_build import (
    BACKENDS,
    CPU,
    CPU_BITS,
    LAYERS,
    STEPS,
    TOLERANCE,
    HostReads,
    both,
    noise,
)

MIXED = WeightSpec(4, mixture=((1, 2), (3, 5), (4, 5)))
GROUPS = WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32)
A8, PARTS = ActivationSpec(8), (33, 7)
FORMATS = {
    "scaled W4": LayerSpec(WeightSpec(4), A8, channel_scale=True),
    "scaled W8, split": LayerSpec(WeightSpec(8), A8, PARTS, channel_scale=True),
    "shifted W8": LayerSpec(WeightSpec(8), A8, channel_shift=True),
    "shifted W6 per tensor": LayerSpec(WeightSpec(6, granularity=Granularity.PER_TENSOR), A8, channel_shift=True),
    "both W4 in groups, split": LayerSpec(GROUPS, A8, PARTS, channel_scale=True, channel_shift=True),
    "both W4 multiplied, split": LayerSpec(multiplied(), A8, PARTS, channel_scale=True, channel_shift=True),
    "both W6 multiplied": LayerSpec(multiplied(6), A8, channel_scale=True, channel_shift=True),
    "both W8, split, static": LayerSpec(
        WeightSpec(8), ActivationSpec(8, mode=ActivationMode.STATIC), PARTS, channel_scale=True, channel_shift=True
    ),
    "mixed": LayerSpec(MIXED, ActivationSpec(4)),
    "mixed with 8 bits": LayerSpec(WeightSpec(8, mixture=((1, 1), (2, 2), (5, 4), (8, 5))), A8),
    "mixed, both, split, bits by step": LayerSpec(
        MIXED, ActivationSpec(6, step_bits=(6, 4, 3)), PARTS, channel_scale=True, channel_shift=True
    ),
}


def made(layer: Quantizable, spec: LayerSpec) -> tuple[nn.Sequential, StepClock]:
    """A model of one layer with random codes and factors; its clock shows step 1."""
    draw, clock = torch.Generator().manual_seed(0), StepClock(STEPS)
    made = QuantLayer(layer.requires_grad_(False), spec, clock)
    if spec.weight.mixture:
        made.set_channel_bits(made.channel_bits[torch.randperm(made.shape[0], generator=draw)])
    top = torch.as_tensor(made.top).expand(made.shape[0], made.columns)
    codes = (torch.rand(top.shape, generator=draw) * (top + 1)).to(torch.uint8)
    zero = (torch.rand(made.zero_point.shape, generator=draw) * (top[: len(made.zero_point), :1] + 1)).to(torch.uint8)
    if spec.weight.is_multiplied:
        made.set_codes(codes, *random_grid(made, draw))
    else:
        made.set_codes(codes, torch.rand(made.scale.shape, generator=draw) * 0.02 + 0.005, zero)
    for i, quantizer in enumerate(part for part in made.act_quantizers if isinstance(part, ActivationQuantizer)):
        if not quantizer.spec.is_dynamic:
            rows = len(quantizer.scale)
            levels = quantizer.tops if len(quantizer.tops) else torch.full((rows,), 2.0**quantizer.spec.bits - 1)
            fine = 2.0 ** -(SHIFT_DEPTH if spec.channel_shift else 0)
            steps = torch.linspace(5.0, 6.0 + i, rows) / levels * fine
            quantizer.set_qparams(QParams(steps, (levels * torch.linspace(0.4, 0.55, rows)).round()))
        if spec.channel_shift:
            shift = torch.where(torch.rand(quantizer.channel_shift.shape, generator=draw) < 0.1, 2, SHIFT_DEPTH)
            shift[0, 3] = 0
            quantizer.channel_shift.copy_(shift)
        if spec.channel_scale:
            quantizer.channel_scale.copy_(torch.exp(0.4 * torch.randn(len(quantizer.channel_scale), generator=draw)))
    if not clock.follows:
        clock.set_timestep(500.0)
    return nn.Sequential(made), clock


@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3", "conv strided", "conv 1x1"])
@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_the_cpu_computes_what_the_reference_does(name: str, spec: LayerSpec) -> None:
    make, shape = LAYERS[name]
    model, clock = made(make(), spec)
    assert both(model, noise(*shape), CPU) < TOLERANCE
    again, clock = made(make(), spec)
    clock.set_timestep(torch.tensor([900.0, 100.0]))
    assert both(again, noise(*shape), CPU) < TOLERANCE, "a batch of several steps"


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("linear 3-D", (2, 2, 40), "scaled W4"),
        ("linear 3-D", (2, 2, 40), "shifted W8"),
        ("linear 3-D", (2, 2, 40), "both W4 in groups, split"),
        ("linear 3-D", (2, 2, 40), "mixed with 8 bits"),
        ("conv 1x1", (2, 40, 3, 2), "mixed, both, split, bits by step"),
        ("conv 3x3", (2, 40, 3, 2), "both W4 in groups, split"),
        ("conv 3x3", (2, 40, 3, 2), "both W4 multiplied, split"),
        ("linear 3-D", (2, 2, 40), "both W6 multiplied"),
        ("conv strided", (2, 40, 3, 3), "mixed"),
    ],
)
def test_triton_computes_what_the_reference_does(name: str, shape: tuple[int, ...], wanted: str) -> None:
    model, clock = made(LAYERS[name][0](), FORMATS[wanted])
    clock.set_timestep(torch.tensor([900.0, 100.0]))
    assert both(model, noise(*shape), KernelBackend.TRITON) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [ActivationMode.DYNAMIC_SAMPLE, ActivationMode.DYNAMIC_TOKEN])
def test_scaled_channels_with_ranges_at_run_time(mode: ActivationMode, backend: KernelBackend) -> None:
    """A convolution takes the range of a sample in either mode, so the CPU runs it."""
    spec = LayerSpec(MIXED, ActivationSpec(8, mode=mode), PARTS, channel_scale=True)
    make, shape = LAYERS["conv 1x1"]
    assert both(made(make(), spec)[0], noise(*shape), backend) < TOLERANCE
    if backend is KernelBackend.TRITON:
        make, shape = LAYERS["linear 3-D"]
        assert both(made(make(), spec)[0], noise(*shape), backend) < TOLERANCE


def channels_of(part: LayerPart) -> list[int]:
    return list(range(part.start, part.stop)) if part.channels is None else part.channels.tolist()


def test_channels_are_multiplied_again_only_for_the_exponents_that_they_have() -> None:
    model, _ = made(nn.Linear(40, 12), FORMATS["shifted W8" if CPU_BITS == 8 else "shifted W6 per tensor"])
    shift = model[0].act_quantizers[0].channel_shift.clone()
    build_runtime(model, CPU)
    parts = model[0].parts
    assert model[0].run.reason.endswith("bytes, int8 products, 3 parts")
    for part, exponent in zip(parts, (3, 2, 0), strict=True):
        assert part.table is not None
        want = list(range(40)) if exponent == 3 else (shift == exponent).any(0).nonzero()[:, 0].tolist()
        assert channels_of(part) == want
        assert torch.equal(part.table.divisor.isfinite(), (shift == exponent)[:, want])
    assert len(channels_of(parts[1])) + len(channels_of(parts[2])) < 20


def test_scale_groups_stay_whole() -> None:
    model, _ = made(nn.Linear(100, 12), LayerSpec(GROUPS, A8, channel_shift=True))
    shift = model[0].act_quantizers[0].channel_shift
    shift.fill_(SHIFT_DEPTH)
    shift[1, 70] = shift[2, 97] = 1
    assert both(model, noise(2, 100), KernelBackend.TRITON) < TOLERANCE
    assert channels_of(model[0].parts[1]) == list(range(64, 100))


@pytest.mark.parametrize("name", ["linear 3-D", pytest.param("conv 3x3", marks=pytest.mark.slow)])
def test_such_layers_compile_whole(name: str) -> None:
    make, shape = LAYERS[name]
    model, clock = made(make(), FORMATS["mixed, both, split, bits by step"])
    build_runtime(model, CPU)

    def run(x: Tensor, timestep: Tensor) -> Tensor:
        clock.set_timestep(timestep)
        return model(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for timestep in (torch.tensor([900.0, 100.0]), torch.tensor([500.0, 500.0])):
            want = run(noise(*shape), timestep)
            assert torch.allclose(compiled(noise(*shape), timestep), want, atol=1e-5 * float(want.abs().max()))


def test_no_step_is_read_by_the_host() -> None:
    """As in test_runtime: the CPU stands for a GPU, the reference of the operators for their kernels."""
    model, clock = made(nn.Linear(40, 12), FORMATS["mixed, both, split, bits by step"])
    other, slow = made(nn.Linear(40, 12), FORMATS["mixed, both, split, bits by step"])
    other[0].bias = model[0].bias
    build_runtime(model, KernelBackend.TRITON)
    assert isinstance(model[0], RuntimeLayer)
    model[0].run = dataclasses.replace(model[0].run, backend=KernelBackend.REFERENCE)
    clock.run_on(torch.device("cpu"))
    for timestep in (torch.tensor(500.0), torch.tensor([900.0, 100.0])):
        with torch.no_grad():
            with HostReads() as reads:
                clock.set_timestep(timestep)
                got = model(noise(2, 40))
            assert reads.count == 0
            slow.set_timestep(timestep)
            want = other(noise(2, 40))
        assert torch.allclose(got, want, atol=TOLERANCE * float(want.abs().max()))
