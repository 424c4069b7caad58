"""Blocks whose convolutions compute the norms in front of them and the sum behind, against diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from kernels.cpu_weight import sums_pairs_exactly
from quant_core.nn.layers import QUANTIZABLE, QuantLayer
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime
from quant_core.runtime.fused_blocks import FusedResnetBlock, Projection
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from tests.quant_core.runtime.test_build import noise

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
BACKENDS = [KernelBackend.CPU, KernelBackend.TRITON]
# Weights of the most bits that this CPU's int8 products hold.
BITS = 8 if sums_pairs_exactly() else 6
# Of the largest output: a few codes that fall to the other side of a middle, of 255 and in two layers.
TOLERANCE = 0.02


class Model(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.block(x, temb)


def model_of(spec: ActivationSpec | None = None, outputs: int = 48, **options: object) -> Model:
    """A ResNet block of 32 channels, its weights quantized to `BITS`, at step 1 of 2."""
    torch.manual_seed(0)
    return quantize(
        ResnetBlock2D(in_channels=32, out_channels=outputs, temb_channels=16, groups=8, **options).eval(), spec
    )


def quantize(made: nn.Module, spec: ActivationSpec | None = None) -> Model:
    """A model of a block, its weights quantized to `BITS`, at step 1 of 2."""
    clock = StepClock([900.0, 100.0])
    for name, layer in list(made.named_modules()):
        if isinstance(layer, QUANTIZABLE):
            quantized = QuantLayer(
                layer.requires_grad_(False), LayerSpec(WeightSpec(BITS), spec or ActivationSpec(8)), clock
            )
            low, high = layer.weight.flatten(1).amin(1, keepdim=True), layer.weight.flatten(1).amax(1, keepdim=True)
            scale = (high - low) / (2**BITS - 1)
            zero = (-low / scale).round()
            codes = (layer.weight.flatten(1) / scale + zero).round().clamp(0, 2**BITS - 1)
            quantized.set_codes(codes.to(torch.uint8), scale, zero.to(torch.uint8))
            for quantizer in quantized.act_quantizers:
                if not quantizer.spec.is_dynamic:
                    rows = len(quantizer.scale)
                    quantizer.set_qparams(QParams(torch.linspace(0.04, 0.03, rows), torch.full((rows,), 100.0)))
            parent, _, last = name.rpartition(".")
            setattr(made.get_submodule(parent), last, quantized)
    if not clock.follows:
        clock.set_timestep(100.0)
    return Model(made)


def difference(model: nn.Module, backend: KernelBackend, x: Tensor, temb: Tensor) -> float:
    """Largest difference between runtime and reference, in units of the largest output."""
    with torch.no_grad():
        want = model(x, temb)
        build_runtime(model, backend)
        got = model(x, temb)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"outputs": 32}, {"output_scale_factor": 2.0}, {"skip_time_act": True}], ids=str
)
def test_a_block_is_fused(backend: KernelBackend, options: dict[str, object]) -> None:
    model = model_of(**options)
    norm = copy.deepcopy(model.block.norm1)
    # A large embedding: whether it passes SiLU shows.
    assert difference(model, backend, noise(2, 32, 6, 5) * 2, noise(2, 16) * 30) < TOLERANCE
    block = model.block
    assert isinstance(block, FusedResnetBlock)
    assert (block.norm1, block.norm2) == (None, None)
    for layer in (block.conv1, block.conv2):
        assert isinstance(layer, RuntimeLayer)
        assert layer.norm is not None
        assert "GroupNorm" in layer.run.reason
    assert block.conv1.norm.groups == norm.num_groups
    assert torch.equal(block.conv1.norm.weight, norm.weight)
    assert {run.reason for run in model.quantmill_runs if run.layer == "block.conv1"} == {block.conv1.run.reason}


@pytest.mark.parametrize(
    "options",
    [{"time_embedding_norm": "scale_shift"}, {"down": True}, {"up": True}, {"non_linearity": "gelu"}],
    ids=["modulated", "down", "up", "gelu"],
)
def test_other_blocks_stay(options: dict[str, object]) -> None:
    model = model_of(**options)
    assert difference(model, KernelBackend.CPU, noise(2, 32, 6, 6), noise(2, 16)) < TOLERANCE
    assert isinstance(model.block, ResnetBlock2D)
    assert model.block.conv1.norm is None


def test_a_layer_without_tables_leaves_the_norm_in_front() -> None:
    model = model_of(ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE))
    assert difference(model, KernelBackend.CPU, noise(2, 32, 6, 6), noise(2, 16)) < TOLERANCE
    assert isinstance(model.block, FusedResnetBlock)
    assert isinstance(model.block.norm1, nn.GroupNorm)
    assert model.block.conv1.norm is None


def test_a_cast_block_normalizes_in_float32() -> None:
    model = model_of()
    x, temb = noise(2, 32, 6, 5), noise(2, 16)
    with torch.no_grad():
        want = model(x, temb)
        build_runtime(model, KernelBackend.CPU)
        got = model.to(torch.bfloat16)(x.bfloat16(), temb.bfloat16())
    assert got.dtype is torch.bfloat16
    assert float((got.float() - want).abs().max() / want.abs().max()) < 2 * TOLERANCE


def test_a_whole_model_fuses_all_it_can(tiny_model: Make, quantize_model: Quantize) -> None:
    model = tiny_model("unet")
    quantize_model(model, bits=BITS)
    build_runtime(model, KernelBackend.CPU)
    blocks = [module for module in model.modules() if isinstance(module, FusedResnetBlock)]
    assert len(blocks) > 3
    assert not any(isinstance(module, ResnetBlock2D) for module in model.modules())
    assert all(block.conv2.norm is not None for block in blocks)
    assert {block.conv1.norm is not None for block in blocks} == {True, False}, "inputs of some are split"
    assert all(len(block.conv1.parts) > 1 for block in blocks if block.conv1.norm is None)
    assert isinstance(model.conv_norm_out, nn.Identity)
    assert model.conv_out.norm is not None


class Alone(nn.Module):
    """What a block computes that is given nothing but its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("kind", ["geglu", "gelu", "gelu-approximate", "geglu-approximate"])
def test_the_second_linear_of_a_feed_forward_takes_the_activation(kind: str) -> None:
    torch.manual_seed(0)
    for backend in BACKENDS:
        model = quantize(Alone(FeedForward(32, activation_fn=kind).eval()))
        assert difference(model, backend, noise(2, 5, 32) * 2, noise(1)) < TOLERANCE
        first, _, last = model.block.block.net
        assert isinstance(last, RuntimeLayer)
        fused = backend is KernelBackend.TRITON and kind != "geglu-approximate"
        assert isinstance(first, Projection) is fused
        assert (last.gate is not None) is fused
        (run,) = (run for run in model.quantmill_runs if run.layer.endswith("net.2"))
        assert run.reason.endswith("gelu with the quantization" if kind == "gelu" else "with the quantization") is fused


def test_a_feed_forward_whose_ranges_are_found_at_run_time_keeps_its_activation() -> None:
    model = quantize(Alone(FeedForward(32).eval()), ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN))
    assert difference(model, KernelBackend.TRITON, noise(2, 5, 32), noise(1)) < TOLERANCE
    assert model.block.block.net[2].gate is None
