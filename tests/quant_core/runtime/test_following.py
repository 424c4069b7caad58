"""Layers in differences between steps on integer backends, along a trajectory, against the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from quant_core.errors import TrajectoryError
from quant_core.nn.layers import QuantLayer
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime, layer_runs
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import Granularity, KernelBackend
from quant_spec.formats import SHIFT_DEPTH, ActivationSpec, LayerSpec, WeightSpec
from tests.quant_core.runtime.test_build import BACKENDS, CPU_BITS, LAYERS, noise
from tests.quant_core.runtime.test_fused_blocks import Model, model_of
from tests.quant_core.runtime.test_parts import made

#: Of the range of a layer's output, for one layer that reads the same inputs over a trajectory.
TOLERANCE = 1e-5
STEPS = (900.0, 500.0, 100.0)
CHANGING = ActivationSpec(8, step_bits=(8, 6, 4), differences=(1, 2))
FORMATS = {
    "plain": LayerSpec(WeightSpec(4), CHANGING),
    "scaled W4 in groups": LayerSpec(
        WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32), CHANGING, channel_scale=True
    ),
    "split": LayerSpec(WeightSpec(6), CHANGING, (33, 7), channel_scale=True),
    "shifted": LayerSpec(WeightSpec(4), CHANGING, channel_scale=True, channel_shift=True),
    "mixed": LayerSpec(WeightSpec(4, mixture=((1, 2), (3, 5), (4, 5))), CHANGING),
    "low rank": LayerSpec(WeightSpec(4), CHANGING, low_rank=3),
    "plain in between": LayerSpec(WeightSpec(4), ActivationSpec(8, step_bits=(8, 8, 4), differences=(2,))),
}


def layers_of(name: str, spec: LayerSpec, backend: KernelBackend) -> tuple[QuantLayer, RuntimeLayer]:
    """A layer on the reference and on a backend, each with a clock of its own; grids of differences are narrow."""
    model, _ = made(LAYERS[name][0](), spec)
    layer = model[0]
    assert isinstance(layer, QuantLayer)
    for quantizer in layer.act_quantizers:
        quantizer.scale[1:] *= torch.tensor([0.2, 0.15])
        if spec.channel_shift:
            quantizer.channel_shift[1:] = SHIFT_DEPTH
    if spec.low_rank:
        layer.set_branch(0.1 * torch.randn_like(layer.low_rank_down), 0.1 * torch.randn_like(layer.low_rank_up))
    twin = copy.deepcopy(model)
    build_runtime(twin, backend)
    other = twin[0]
    assert isinstance(other, RuntimeLayer), layer_runs(twin)
    return layer, other


def at(layer: QuantLayer | RuntimeLayer, timestep: float) -> None:
    assert layer.clock is not None
    layer.clock.set_timestep(timestep)


def inputs(name: str) -> list[Tensor]:
    """Inputs that change little from step to step."""
    x, found = noise(*LAYERS[name][1]), []
    for step in STEPS:
        found.append(x)
        x = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(int(step)))
    return found


# The interpreter of Triton takes seconds for a convolution.
CASES = [(name, spec, KernelBackend.CPU) for name in ("linear 3-D", "conv 3x3", "conv strided") for spec in FORMATS]
CASES += [("linear 3-D", spec, KernelBackend.TRITON) for spec in FORMATS]
CASES += [("conv 3x3", spec, KernelBackend.TRITON) for spec in ("plain", "split")]


@pytest.mark.parametrize(("name", "which", "backend"), CASES)
def test_what_is_held_is_equal_and_outputs_within_rounding(name: str, which: str, backend: KernelBackend) -> None:
    spec = FORMATS[which]
    if backend is KernelBackend.CPU and spec.weight.bits > CPU_BITS:
        pytest.skip("this CPU's int8 products would saturate")
    layer, other = layers_of(name, spec, backend)
    residual = None
    for step, (timestep, x) in enumerate(zip(STEPS, inputs(name), strict=True)):
        at(layer, timestep)
        at(other, timestep)
        with torch.no_grad():
            wanted = layer(x)
            residual = noise(*wanted.shape)
            found = other(x, residual=residual) - residual if step == 1 else other(x)
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.max() - wanted.min())
        held, kept = layer.memory.held, other.memory.held
        assert (held is None) == (kept is None) == (step + 1 not in layer.differences)
        if held is not None and kept is not None:
            rows = kept.permute(0, 3, 1, 2) if held.dim() == 4 else kept
            assert torch.equal(rows, held)
        found.zero_()  # writes to what a layer gives change nothing of what it remembers
    assert "of differences" in other.run.reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_out_of_order_is_refused_here_too(backend: KernelBackend) -> None:
    layer, other = layers_of("linear 3-D", FORMATS["plain"], backend)
    xs = inputs("linear 3-D")
    at(other, STEPS[0])
    other(xs[0])
    at(other, STEPS[1])
    with pytest.raises(TrajectoryError, match=r"got an input of shape \(1, 5, 40\) at step 1, wanted \(2, 5, 40\)"):
        other(xs[1][:1])
    with pytest.raises(TrajectoryError, match="after step 1, wanted step 2"):
        at(other, STEPS[1])
    at(other, STEPS[2])
    with pytest.raises(TrajectoryError, match="got step 2 of a trajectory without its step 1"):
        other(xs[2])
    at(layer, STEPS[0])
    at(other, STEPS[0])
    torch.testing.assert_close(other(xs[0]), layer(xs[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (KernelBackend.CPU, torch.float32),
        (KernelBackend.CPU, torch.bfloat16),
        (KernelBackend.TRITON, torch.float32),
    ],
)
def test_blocks_fuse_norms_and_sums_with_differences(backend: KernelBackend, dtype: torch.dtype) -> None:
    spec = ActivationSpec(8, step_bits=(8, 4), differences=(1,))
    reference = model_of(spec)
    model = copy.deepcopy(reference)
    build_runtime(model, backend)
    _check_block(reference, model, dtype)


def _check_block(reference: Model, model: Model, dtype: torch.dtype) -> None:
    assert not any(isinstance(module, ResnetBlock2D) for module in model.modules())
    x, temb = noise(2, 32, 4, 4), noise(2, 16)
    clocks = [_clock(reference), _clock(model)]
    reference.to(dtype)
    for step, timestep in enumerate((900.0, 100.0)):
        x = x + 0.1 * step * noise(2, 32, 4, 4)
        for clock in clocks:
            clock.set_timestep(timestep)
        with torch.no_grad():
            wanted = reference(x.to(dtype), temb.to(dtype)).float()
            found = model(x.to(dtype), temb.to(dtype))
        assert found.dtype is dtype
        off = (found.float() - wanted).abs()
        # A few codes fall to the other side of a middle.
        assert float(off.max()) <= 0.05 * float(wanted.abs().max())
        assert float(off.norm()) <= 0.02 * float(wanted.norm())


def _clock(model: nn.Module) -> StepClock:
    return next(module.clock for module in model.modules() if isinstance(module, QuantLayer | RuntimeLayer))  # type: ignore[return-value]
