"""A layer in differences between steps: the closed loop itself, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.errors import TrajectoryError
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_core.nn.ranges import QParams, qparams_from_range
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, WeightSpec

TIMESTEPS = (900.0, 600.0, 300.0, 100.0)
CHANGING = ActivationSpec(8, step_bits=(8, 4, 4, 4), differences=(1, 2, 3))


class Net(nn.Module):
    """One layer, called as a denoiser is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor | float) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def quantized(layer: nn.Module, spec: LayerSpec, timesteps: tuple[float, ...] = TIMESTEPS) -> tuple[Net, QuantLayer]:
    """Quantize a layer to codes that hold its weights exactly, with grids that shrink after the first step."""
    net = Net(layer)
    parts: QuantizedParts = build_quantized(net, ModelFormat({"layer": spec}, {}, timesteps))
    made = parts.layers["layer"]
    codes = torch.randint(0, 16, (made.shape[0], made.columns), generator=torch.Generator().manual_seed(1))
    made.set_codes(codes.to(torch.uint8), torch.full_like(made.scale, 0.05), torch.full_like(made.zero_point, 7))
    for quantizer in made.act_quantizers:
        assert isinstance(quantizer, ActivationQuantizer)
        grids = [qparams_from_range(torch.tensor(-4.0), torch.tensor(4.0), 8, symmetric=False)]
        grids += [qparams_from_range(torch.tensor(-0.7), torch.tensor(0.8), 4, symmetric=False)] * (len(timesteps) - 1)
        quantizer.set_qparams(
            QParams(torch.stack([g.scale for g in grids]), torch.stack([g.zero_point for g in grids]))
        )
    return net.eval().requires_grad_(False), made


def inputs(*shape: int, steps: int = 4) -> list[Tensor]:
    """Inputs that change little from step to step."""
    generator = torch.Generator().manual_seed(0)
    x, found = torch.randn(*shape, generator=generator).clamp(-1.9, 1.9), []
    for _ in range(steps):
        found.append(x)
        x = x + 0.05 * torch.randn(*shape, generator=generator)
    return found


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, object]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6), {}),
    "convolution": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 4), {}),
    "split": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 4, 4), {"split": (2, 4)}),
    "scaled": (lambda: nn.Conv2d(6, 5, 3), (2, 6, 4, 4), {"channel_scale": True}),
    "scaled linear": (lambda: nn.Linear(6, 5), (2, 3, 6), {"channel_scale": True}),
    "shifted": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 4, 4), {"channel_shift": True}),
    "low rank": (lambda: nn.Linear(6, 5), (2, 3, 6), {"low_rank": 2}),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_output_is_that_of_the_input_that_is_held_and_errors_do_not_add_up(kind: str) -> None:
    make, shape, more = LAYERS[kind]
    spec = LayerSpec(WeightSpec(4), CHANGING, **more)  # type: ignore[arg-type]
    net, layer = quantized(make(), spec)
    if spec.channel_scale:
        layer.set_channel_scale(torch.linspace(0.5, 2, 6))
    if spec.low_rank:
        layer.set_branch(torch.randn(2, 6), torch.randn(5, 2))
    exact = layer.unscaled(layer.weight)
    for step, x in enumerate(inputs(*shape)):
        out = net(x, TIMESTEPS[step])
        held = layer.memory.held
        if step == 3:
            assert held is None  # nothing is kept beyond the last step
            assert layer.memory.nbytes == 0
            break
        assert held is not None
        assert held.shape == x.shape
        # One step of the grid at most, times what its channel was divided by; never more, however many steps.
        bound = (1.5 / 15 if step else 8 / 255) * 0.51 * (2 if spec.channel_scale else 1)
        assert float((held - x).abs().max()) <= bound
        if spec.low_rank:
            branch = layer.branch()
            assert branch is not None
            wanted = layer._multiply(held, exact - branch, layer.bias) + layer._multiply(x, branch, None)
        else:
            wanted = layer._multiply(held, exact, layer.bias)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-5)
        out.zero_()  # what a model does to outputs changes nothing of what is remembered


def test_a_plain_step_in_between_starts_anew() -> None:
    spec = replace(CHANGING, step_bits=(8, 4, 8, 4), differences=(1, 3))
    net, layer = quantized(nn.Linear(6, 5), LayerSpec(WeightSpec(4), spec))
    quantizer = layer.act_quantizers[0]
    quantizer.scale[2], quantizer.zero_point[2] = quantizer.scale[0], quantizer.zero_point[0]  # type: ignore[operator]
    xs = inputs(2, 3, 6)
    for step in (0, 1, 2):
        out = net(xs[step], TIMESTEPS[step])
        assert (layer.memory.held is None) == (step == 1)  # the next step does not ask for it
    plain = quantizer(xs[2])
    torch.testing.assert_close(out, F.linear(plain, layer.weight, layer.bias))


def test_each_trajectory_starts_anew_whatever_became_of_the_last() -> None:
    net, _ = quantized(nn.Linear(6, 5), LayerSpec(WeightSpec(4), CHANGING))
    xs = inputs(2, 3, 6)
    first = [net(x, t) for x, t in zip(xs, TIMESTEPS, strict=True)]
    net(xs[3], TIMESTEPS[0])
    net(xs[2], TIMESTEPS[1])  # interrupted
    again = [net(x, t) for x, t in zip(xs, TIMESTEPS, strict=True)]
    other = [net(x[:1], t) for x, t in zip(xs, TIMESTEPS, strict=True)]  # another batch size
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one[:1], three)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ((600,), r"got 600, step 1 of 4, as the first call, wanted step 0 \(900\)"),
        ((900, 300), r"got 300, step 2 of 4, after step 0, wanted step 1 \(600\), or step 0 \(900\): .*steps=4"),
        ((900, 600, 600), r"got 600, step 1 of 4, after step 1, wanted step 2 \(300\), or step 0"),
        ((900, 600, 300, 100, 600), r"after step 3, wanted step 0 \(900\)"),
        ((torch.tensor([900, 600]),), r"got steps \[0, 1\] in one batch, wanted one step for all"),
    ],
)
def test_steps_that_do_not_follow_each_other_are_refused(calls: tuple[float, ...], message: str) -> None:
    net, _ = quantized(nn.Linear(6, 5), LayerSpec(WeightSpec(4), CHANGING))
    x = inputs(2, 3, 6)[0]
    for timestep in calls[:-1]:
        net(x, timestep)
    with pytest.raises(TrajectoryError, match=message):
        net(x, calls[-1])
    assert torch.equal(net(x, 900), net(x, 900))  # a new trajectory goes on


def test_another_batch_within_a_trajectory_is_refused() -> None:
    net, _ = quantized(nn.Linear(6, 5), LayerSpec(WeightSpec(4), CHANGING))
    x = inputs(2, 3, 6)[0]
    net(x, 900)
    with pytest.raises(
        TrajectoryError, match=r"layer layer: got an input of shape \(1, 3, 6\) at step 1, wanted \(2, 3"
    ):
        net(x[:1], 600)


def test_a_call_that_ended_early_is_not_gone_on_from() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fails = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor, timestep: float) -> Tensor:
            x = self.one(x)
            if self.fails:
                raise KeyboardInterrupt
            out: Tensor = self.two(x)
            return out

    net = Two()
    build_quantized(net, ModelFormat(dict.fromkeys(("one", "two"), LayerSpec(WeightSpec(4), CHANGING)), {}, TIMESTEPS))
    x = torch.zeros(1, 4)
    net(x, 900)
    net.fails = True
    with pytest.raises(KeyboardInterrupt):
        net(x, 600)
    net.fails = False
    with pytest.raises(TrajectoryError, match="layer two: got step 2 of a trajectory without its step 1"):
        net(x, 300)


def test_timesteps_that_a_sampler_has_twice_are_told_apart_by_their_turn() -> None:
    spec = LayerSpec(WeightSpec(4), CHANGING)
    net, layer = quantized(nn.Linear(6, 5), spec, (900.0, 600.0, 600.0, 100.0))
    for timestep, step in ((900, 0), (600, 1), (600, 2), (100, 3), (900, 0)):
        net(torch.zeros(1, 6), timestep)
        assert layer.clock.step == step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"differences": (0, 1)}, r"differences: got steps \[0, 1\], wanted rising ones within 1 to 3"),
        ({"differences": (4,)}, r"wanted rising ones within 1 to 3"),
        ({"differences": (2, 1)}, r"differences: got steps \[2, 1\]"),
        ({"differences": (1,), "mode": "static", "step_bits": ()}, "got int codes static, wanted int codes per_step"),
    ],
)
def test_formats_that_can_not_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        replace(CHANGING, **changes)  # type: ignore[arg-type]


def test_a_format_is_read_as_it_is_written() -> None:
    spec = LayerSpec(WeightSpec(4), CHANGING)
    assert LayerSpec.from_json(spec.to_json()) == spec
    assert "differences" not in ActivationSpec(8).to_json()
    with pytest.raises(QuantizationError, match="attention: got operands in differences"):
        AttentionSpec(CHANGING)
