"""LayerNorms that the layers behind them compute: the same codes as of a norm apart, in diffusers' own blocks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.fp8 import Fp8Matrix
from kernels.norms import NORM_CODE_SHARE
from quant_core.diffusion.conditioning import conditioning_fields, is_shared
from quant_core.diffusion.denoiser import call_denoiser, sample_shape
from quant_core.nn.layers import QUANTIZABLE, QuantLayer, replace_module
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime
from quant_core.runtime.fused_blocks import Projection
from quant_core.runtime.layer import RuntimeLayer
from quant_core.runtime.normalized import LayerNormBehind, Normalized
from quant_spec.enums import ActivationMode, KernelBackend, NumberType
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
READERS = {
    "dit": {
        f"transformer_blocks.{block}.{name}"
        for block in (0, 1)
        for name in (*(f"attn1.{each}" for each in QKV), "ff.net.0.proj")
    },
    "sd3": {
        *(f"transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in (*QKV, *ADDED)),
        *(f"transformer_blocks.{block}.ff.net.0.proj" for block in (0, 1)),
        "transformer_blocks.0.ff_context.net.0.proj",
    },
    "flux": {
        *(f"transformer_blocks.0.attn.{name}" for name in (*QKV, *ADDED)),
        *(f"transformer_blocks.0.{name}.net.0.proj" for name in ("ff", "ff_context")),
        *(f"single_transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in QKV),
        *(f"single_transformer_blocks.{block}.proj_mlp" for block in (0, 1)),
    },
}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@torch.no_grad()
def predict(model: nn.Module, timestep: float = 500.0) -> Tensor:
    conditioning = {
        key: torch.tensor([1, 3]) if field.classes else noise(*(() if is_shared(key) else (2,)), *field.shape)
        for key, field in conditioning_fields(model).items()
    }
    for key, rows in (("img_ids", 9), ("txt_ids", 5)):  # of flux: few tokens, for an interpreter
        if key in conditioning:
            conditioning[key] = conditioning[key][:rows]
    if "encoder_hidden_states" in conditioning:
        conditioning["encoder_hidden_states"] = conditioning["encoder_hidden_states"][:, :5]
    tokens = 9 if "img_ids" in conditioning else None
    return call_denoiser(model, noise(2, *sample_shape(model, tokens)), torch.tensor(timestep), conditioning)


def runtime_layers(model: nn.Module) -> Iterator[RuntimeLayer]:
    return (module for module in model.modules() if isinstance(module, RuntimeLayer))


def apart(model: nn.Module) -> nn.Module:
    """A copy whose norms are computed where they stand."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, LayerNormBehind):
            module.forward = functools.partial(nn.LayerNorm.forward, module)  # type: ignore[method-assign]
    return twin


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("dit", ActivationMode.PER_STEP),
        pytest.param("dit", ActivationMode.DYNAMIC_TOKEN, marks=pytest.mark.slow),
        pytest.param("sd3", ActivationMode.PER_STEP, marks=pytest.mark.slow),
        ("flux", ActivationMode.DYNAMIC_TOKEN),
    ],
)
def test_layers_of_whole_models_make_the_codes_of_a_norm_apart(
    tiny_model: Make, quantize_model: Quantize, family: str, mode: ActivationMode
) -> None:
    model = tiny_model(family)
    quantize_model(model, mode, bits=8)
    build_runtime(model, KernelBackend.TRITON)
    unfused = apart(model)
    off: dict[str, Tensor] = {}

    def look(layer: RuntimeLayer, args: tuple[Tensor, ...]) -> None:
        if isinstance(args[0], Normalized):
            shared, layer.shared = layer.shared, None
            fused, plain = (layer.codes(x, layer.parts[0]) for x in (args[0], args[0].value()))
            layer.shared = shared
            assert torch.allclose(fused.scale, plain.scale, rtol=1e-5)
            assert torch.equal(fused.zero_point, plain.zero_point)
            off[layer.run.layer] = (fused.codes.int() - plain.codes.int()).abs().flatten()

    for layer in runtime_layers(model):
        layer.register_forward_pre_hook(look)  # type: ignore[arg-type]
    got, want = predict(model), predict(unfused)
    assert set(off) == READERS[family]
    said = {layer.run.layer for layer in runtime_layers(model) if "LayerNorm and modulation" in layer.run.reason}
    assert said == READERS[family]
    every = torch.cat(list(off.values()))
    assert int(every.max()) <= 1
    assert float((every > 0).float().mean()) <= NORM_CODE_SHARE
    assert float((got - want).norm()) <= 0.02 * float(want.norm())
    assert not any(isinstance(module, nn.LayerNorm) and "to_q" in name for name, module in model.named_modules())


def block_of(
    weight: WeightSpec, activation: ActivationSpec, *, left: tuple[str, ...] = (), **options: Any
) -> nn.Module:
    """A transformer block, by default with modulation, at step 1 of 2; the layers `left` are not quantized."""
    torch.manual_seed(0)
    options = options or {"num_embeds_ada_norm": 5, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
    made = nn.Sequential(BasicTransformerBlock(32, 2, 16, **options)).eval()
    clock = StepClock([900.0, 100.0])
    for name, layer in list(made.named_modules()):
        if not isinstance(layer, QUANTIZABLE) or name.removeprefix("0.") in left or "norm1" in name:
            continue
        quantized = QuantLayer(layer.requires_grad_(False), LayerSpec(weight, activation), clock)
        if not weight.is_float:
            codes = torch.randint(0, 256, (layer.out_features, layer.in_features)).to(torch.uint8)
            quantized.set_codes(
                codes, torch.full_like(quantized.scale, 0.003), torch.full_like(quantized.zero_point, 128)
            )
        else:
            quantized.qweight.copy_(layer.weight * 100)
            quantized.scale.fill_(0.01)
        for quantizer in quantized.act_quantizers:
            if not quantizer.spec.is_dynamic:
                rows = len(quantizer.scale)
                zero = torch.full((rows,), 0.0 if activation.is_float else 100.0)
                quantizer.set_qparams(QParams(torch.linspace(0.04, 0.03, rows), zero))
        replace_module(made, name, quantized)
    if not clock.follows:
        clock.set_timestep(100.0)
    return made.requires_grad_(False)


def run_block(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    told = {"timestep": torch.tensor([100, 100]), "class_labels": torch.tensor([1, 2])}
    return model[0](noise(2, 7, 32).to(dtype), **told)  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("mode", [ActivationMode.PER_STEP, ActivationMode.DYNAMIC_TOKEN])
@torch.no_grad()
def test_layers_in_fp8_make_the_numbers_of_a_norm_apart(mode: ActivationMode) -> None:
    model = block_of(WeightSpec(8, type=NumberType.E4M3), ActivationSpec(8, mode=mode, type=NumberType.E4M3))
    build_runtime(model, KernelBackend.TRITON)
    seen: list[str] = []

    def look(layer: RuntimeLayer, args: tuple[Tensor, ...]) -> None:
        if isinstance(args[0], Normalized):
            fused, plain = (layer._numbers(x, layer.parts[0]) for x in (args[0], args[0].value()))
            assert isinstance(fused, Fp8Matrix)
            assert torch.allclose(fused.scale, plain.scale, rtol=1e-5)
            assert float((fused.values.float() != plain.values.float()).float().mean()) <= NORM_CODE_SHARE
            seen.append(layer.run.layer)

    for layer in runtime_layers(model):
        layer.register_forward_pre_hook(look)  # type: ignore[arg-type]
    got, want = run_block(model), run_block(apart(model))
    assert seen == ["0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_v", "0.ff.net.0.proj"]
    assert float((got - want).norm()) <= 0.01 * float(want.norm())


@pytest.mark.parametrize("kind", ["geglu", "gelu-approximate"])
@torch.no_grad()
def test_a_feed_forward_in_fp8_takes_the_activation(kind: str) -> None:
    numbers = ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN, type=NumberType.E4M3)
    model = block_of(WeightSpec(8, type=NumberType.E4M3), numbers, activation_fn=kind)
    want = run_block(model)
    build_runtime(model, KernelBackend.TRITON)
    first, _, last = model[0].ff.net  # type: ignore[union-attr, misc]
    assert isinstance(first, Projection)
    assert f"{last.gate} with the quantization" in last.run.reason
    assert float((run_block(model) - want).norm()) <= 0.01 * float(want.norm())


@torch.no_grad()
def test_norms_with_weights_in_a_unets_block_are_computed_behind_them() -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8), cross_attention_dim=24, activation_fn="geglu")
    for norm in (model[0].norm1, model[0].norm2, model[0].norm3):  # type: ignore[union-attr]
        norm.weight.copy_(noise(32))
        norm.bias.copy_(noise(33)[1:])
    build_runtime(model, KernelBackend.TRITON)
    read = {layer.run.layer for layer in runtime_layers(model) if layer.normalizes}
    assert read == {"0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_v", "0.attn2.to_q", "0.ff.net.0.proj"}
    x, text = noise(2, 7, 32), noise(2, 5, 24)
    got, want = (each[0](x, encoder_hidden_states=text) for each in (model, apart(model)))  # type: ignore[operator]
    assert float((got - want).norm()) <= 0.01 * float(want.norm())


@torch.no_grad()
def test_what_else_reads_a_norm_gets_its_values() -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8), left=("attn1.to_k", "ff.net.0.proj"))
    build_runtime(model, KernelBackend.TRITON)
    block = model[0]
    assert isinstance(block.norm1.norm, LayerNormBehind), "the queries' layer computes it"
    assert type(block.norm3) is nn.LayerNorm, "its only reader is not quantized"
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        got, want = run_block(model, dtype), run_block(apart(model), dtype)
        assert float((got - want).float().norm()) <= 0.02 * float(want.float().norm())


@pytest.mark.parametrize("backend", [KernelBackend.CPU, KernelBackend.REFERENCE])
def test_norms_stay_where_no_kernel_has_them(backend: KernelBackend) -> None:
    model = block_of(WeightSpec(8), ActivationSpec(8))
    build_runtime(model, backend)
    assert not any(isinstance(module, LayerNormBehind) for module in model.modules())


@pytest.mark.parametrize("activation", [ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE)], ids=str)
def test_layers_with_other_ranges_leave_norms_alone(activation: ActivationSpec) -> None:
    model = block_of(WeightSpec(8), activation)
    build_runtime(model, KernelBackend.TRITON)
    assert not any(isinstance(module, LayerNormBehind) for module in model.modules())


@torch.no_grad()
def test_a_norm_that_is_not_computed_takes_up_a_modulation_and_nothing_else() -> None:
    norm = LayerNormBehind(nn.LayerNorm(6, eps=1e-6))
    x, multiplier, shift = noise(2, 3, 6), noise(2, 1, 6), noise(2, 2, 6)[:, 1:]
    plain = F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-6)
    y = norm(x)
    for taken, want in (
        (y, plain),
        (y * multiplier, plain * multiplier),
        (multiplier * y + shift, plain * multiplier + shift),
    ):
        assert type(taken) is Normalized
        assert taken.is_whole is (taken.multiplier is None or taken.shift is not None)
        assert torch.equal(taken.value(), want)
        assert taken.value() is taken.value()
    whole = y * multiplier + shift
    others = [
        y + shift,
        y * 2.0,
        whole * multiplier,
        whole + shift,
        y * noise(3, 6),
        y * noise(1, 1, 6),
        y[:, 1],
        y + y,
    ]
    wanted = plain * multiplier + shift
    assert [type(each) for each in others] == [Tensor] * len(others)
    for got, want in zip(
        others,
        [plain + shift, plain * 2.0, wanted * multiplier, wanted + shift, plain * noise(3, 6), plain * noise(1, 1, 6),
         plain[:, 1], plain + plain],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)
    half = y.bfloat16() * multiplier.bfloat16()
    assert type(half) is Tensor


def test_norms_are_computed_at_once_where_gradients_or_tracing_need_it() -> None:
    norm = LayerNormBehind(nn.LayerNorm(6).requires_grad_(False))
    x = noise(2, 3, 6)
    assert type(norm(x)) is Normalized
    with torch.inference_mode():
        y = norm(x.clone())
        assert type(y) is Normalized
        assert torch.equal(y + 0.0, F.layer_norm(x, (6,)))
    grown = norm(x.clone().requires_grad_())
    grown.sum().backward()
    assert type(norm(noise(3, 6))) is Tensor, "tokens of no sample"
    traced = torch.compile(lambda t: norm(t) * 2.0, backend="aot_eager", fullgraph=True)
    assert torch.allclose(traced(x), F.layer_norm(x, (6,)) * 2.0)
    assert norm.to("meta")(x.to("meta")).is_meta
