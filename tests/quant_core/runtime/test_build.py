"""Runtime layers against the quantized layers that they replace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cpu_weight, native
from kernels.cpu_measure import Timing, Timings
from kernels.cpu_weight import sums_pairs_exactly
from kernels.native import ProductLevel
from quant_core.nn.layers import Quantizable, QuantLayer, replace_module
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_core.runtime.build import build_runtime, layer_runs
from quant_core.runtime.layer import LayerRun, RuntimeLayer
from quant_spec.enums import ActivationMode, Granularity, KernelBackend
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from tests.quant_core.multiplied import multiplied, random_grid

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]

CPU, TRITON, REFERENCE = KernelBackend.CPU, KernelBackend.TRITON, KernelBackend.REFERENCE
BACKENDS = [CPU, TRITON]
# Weights of the most bits that this CPU's int8 products hold.
CPU_BITS = 8 if sums_pairs_exactly() else 6
STEPS = [900.0, 500.0, 100.0]
A8_STATIC = ActivationSpec(8, mode=ActivationMode.STATIC)
# Of the largest output. The sum of integers is exact; the reference adds up K float32 products, the runtime rounds its
# sum once and adds bias, digits and parts. K is at most 9 * 40 here: some 360 roundings of 2**-24 in the worst case.
TOLERANCE = 2.0**-15

WEIGHTS = {
    "W8 per channel": WeightSpec(8),
    "W8 symmetric": WeightSpec(8, symmetric=True),
    "W8 per tensor": WeightSpec(8, granularity=Granularity.PER_TENSOR),
    "W4 per channel": WeightSpec(4),
    "W4 per group": WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32),
    "W4 multiplied": multiplied(),
}
LAYERS: dict[str, tuple[Callable[[], Quantizable], tuple[int, ...]]] = {
    "linear 2-D": (lambda: nn.Linear(40, 12), (2, 40)),
    "linear 3-D": (lambda: nn.Linear(40, 12), (2, 5, 40)),
    "linear 4-D, large": (lambda: nn.Linear(260, 256), (2, 3, 2, 260)),
    "linear, no bias": (lambda: nn.Linear(40, 12, bias=False), (2, 3, 40)),
    "conv 3x3": (lambda: nn.Conv2d(40, 12, 3, padding=1), (2, 40, 6, 5)),
    "conv strided": (lambda: nn.Conv2d(40, 12, 3, stride=2, padding=1), (2, 40, 7, 6)),
    "conv 1x1": (lambda: nn.Conv2d(40, 12, 1, bias=False), (2, 40, 4, 4)),
    "conv dilated": (lambda: nn.Conv2d(40, 12, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 40, 6, 5)),
}


def quantized(layer: Quantizable, spec: LayerSpec, steps: int = 3) -> tuple[nn.Sequential, StepClock]:
    """A model of one layer with random codes; its clock shows step 1."""
    generator = torch.Generator().manual_seed(0)
    clock = StepClock(STEPS[:steps])
    made = QuantLayer(layer.requires_grad_(False), spec, clock)
    low, high = (128, 129) if spec.weight.symmetric else (0, 1 << spec.weight.bits)
    codes = torch.randint(
        0, 1 << spec.weight.bits, (made.shape[0], made.columns), generator=generator, dtype=torch.uint8
    )
    if spec.weight.is_multiplied:
        made.set_codes(codes, *random_grid(made, generator))
    else:
        made.set_codes(
            codes,
            torch.rand(made.scale.shape, generator=generator) * 0.02 + 0.005,
            torch.randint(low, high, made.zero_point.shape, generator=generator, dtype=torch.uint8),
        )
    for i, quantizer in enumerate(made.act_quantizers if spec.activation is not None else ()):
        if not quantizer.spec.is_dynamic:
            rows = len(quantizer.scale)
            zero = torch.linspace(100, 140 + i, rows).round() * (2**quantizer.spec.bits - 1) // 255
            quantizer.set_qparams(QParams(torch.linspace(0.02, 0.05 + 0.01 * i, rows), zero))
    if steps:
        clock.set_timestep(500.0)
    return nn.Sequential(made), clock


def both(model: nn.Sequential, x: Tensor, backend: KernelBackend, runs_on: KernelBackend | None = None) -> float:
    """Largest difference between runtime and reference, in units of the largest output; the layer's backend checked."""
    with torch.no_grad():
        want = model(x)
        (run,) = build_runtime(model, backend)
        if "saturate" in run.reason and not sums_pairs_exactly() and not is_small(model[0]):
            pytest.skip(run.reason)
        assert run.backend is (runs_on or backend), run.reason
        assert isinstance(model[0], RuntimeLayer) is (run.backend is not REFERENCE)
        got = model(x)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def is_small(layer: nn.Module) -> bool:
    """Whether no CPU's int8 products saturate with a layer's weight: up to 6 bits, no scales per group."""
    assert isinstance(layer, QuantLayer)
    return int(torch.as_tensor(layer.bits).max()) <= 6 and layer.spec.weight.group_size is None


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_cpu_computes_what_the_reference_does(name: str, weight: str) -> None:
    make, shape = LAYERS[name]
    model, _ = quantized(make(), LayerSpec(WEIGHTS[weight], ActivationSpec(8)))
    assert both(model, noise(*shape), CPU) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("linear 3-D", "W8 per channel"),
        ("linear 2-D", "W4 per group"),
        ("linear 3-D", "W4 multiplied"),
        ("conv 3x3", "W4 multiplied"),
        ("conv 3x3", "W4 per channel"),
        ("conv strided", "W8 per tensor"),
    ],
)
def test_triton_computes_what_the_reference_does(name: str, weight: str) -> None:
    make, shape = LAYERS[name]
    model, _ = quantized(make(), LayerSpec(WEIGHTS[weight], ActivationSpec(8)))
    assert both(model, noise(*shape), TRITON) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3"])
@pytest.mark.parametrize(
    "spec",
    [
        ActivationSpec(8, mode=ActivationMode.STATIC),
        ActivationSpec(8, symmetric=True, mode=ActivationMode.DYNAMIC_SAMPLE),
        ActivationSpec(6),
        ActivationSpec(8, step_bits=(8, 4, 6)),
    ],
    ids=str,
)
def test_every_mode_of_activations(name: str, spec: ActivationSpec, backend: KernelBackend) -> None:
    make, shape = LAYERS[name]
    model, _ = quantized(make(), LayerSpec(WeightSpec(4), spec))
    assert both(model, noise(*shape), backend) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "spec", [ActivationSpec(8), ActivationSpec(8, step_bits=(8, 4, 6))], ids=["A8", "bits by step"]
)
@pytest.mark.parametrize("name", ["linear 2-D", "conv 3x3"])
def test_a_batch_may_mix_timesteps(name: str, spec: ActivationSpec, backend: KernelBackend) -> None:
    make, shape = LAYERS[name]
    model, clock = quantized(make(), LayerSpec(WeightSpec(8), spec))
    clock.set_timestep(torch.tensor([900.0, 100.0]))
    assert both(model, noise(*shape), backend) < TOLERANCE
    clock.set_timestep(torch.tensor([900.0, 900.0]))
    alike = model(noise(*shape))
    clock.set_timestep(900.0)
    assert torch.equal(model(noise(*shape)), alike)


def test_frames_of_a_sample_share_its_step() -> None:
    model, clock = quantized(nn.Conv2d(40, 12, 3), LayerSpec(WeightSpec(CPU_BITS), ActivationSpec(8)))
    clock.set_timestep(torch.tensor([900.0, 100.0]))
    assert both(model, noise(6, 40, 5, 5), CPU) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", ["W8 per channel", "W8 per tensor", "W4 per group"])
@pytest.mark.parametrize("name", ["linear 3-D", "conv 1x1"])
def test_split_layers_are_calls_added_up(name: str, weight: str, backend: KernelBackend) -> None:
    make, shape = LAYERS[name]
    model, _ = quantized(make(), LayerSpec(WEIGHTS[weight], ActivationSpec(8), split=(33, 7)))
    assert both(model, noise(*shape), backend) < TOLERANCE
    assert [(part.start, part.stop) for part in model[0].parts] == [(0, 33), (33, 40)]
    assert model[0].run.reason.endswith("2 parts")


def test_half_precision_models_get_their_dtype() -> None:
    model, _ = quantized(nn.Conv2d(40, 12, 3), LayerSpec(WeightSpec(CPU_BITS), ActivationSpec(8)))
    assert both(model.to(torch.bfloat16), noise(1, 40, 5, 5).bfloat16(), CPU) < 0.02
    assert model.to(torch.float32)(noise(1, 40, 5, 5)).dtype is torch.float32


def test_float_activations_run_on_triton_where_it_has_them() -> None:
    model, _ = quantized(nn.Linear(40, 12), LayerSpec(WeightSpec(4)))
    assert both(model, noise(3, 40), TRITON) < TOLERANCE


@pytest.mark.parametrize("split", [None, (16, 24)])
@pytest.mark.parametrize("backend", [TRITON, CPU])
def test_float_activations_are_divided_by_the_scales_that_weights_were_rounded_for(
    backend: KernelBackend, split: tuple[int, ...] | None
) -> None:
    model, _ = quantized(nn.Linear(40, 12), LayerSpec(WeightSpec(8), None, split, channel_scale=True))
    layer, x = model[0], noise(3, 40)
    assert isinstance(layer, QuantLayer)
    scales = torch.linspace(0.5, 2, 40)
    layer.set_channel_scale(scales)
    exact = F.linear(x, layer.weight / scales, layer.bias)
    assert torch.allclose(model(x), exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(layer.unscaled(layer.weight), layer.weight / scales)
    assert both(model, x, backend) < TOLERANCE


@pytest.mark.parametrize(
    ("layer", "spec", "backend", "why"),
    [
        (nn.Conv1d(8, 4, 1), LayerSpec(WeightSpec(8), ActivationSpec(8)), CPU, "Conv1d has no kernel"),
        (nn.Conv2d(8, 4, 1, groups=2), LayerSpec(WeightSpec(8), ActivationSpec(8)), TRITON, "2 groups"),
        (nn.Conv2d(8, 4, 3, padding="same"), LayerSpec(WeightSpec(8), ActivationSpec(8)), CPU, "padding 'same'"),
        (nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), LayerSpec(WeightSpec(8)), CPU, "reflect"),
        (nn.Conv2d(8, 4, 1), LayerSpec(WeightSpec(4)), TRITON, "not quantized"),
        (
            nn.Linear(48, 4),
            LayerSpec(WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=24), ActivationSpec(8)),
            TRITON,
            "multiple of 32",
        ),
        (nn.Linear(8, 4), LayerSpec(WeightSpec(8), ActivationSpec(8)), REFERENCE, "asked for"),
    ],
    ids=str,
)
def test_what_a_backend_cannot_run_exactly_runs_the_reference(
    layer: Quantizable, spec: LayerSpec, backend: KernelBackend, why: str
) -> None:
    model, _ = quantized(layer, spec)
    x = noise(2, layer.weight.shape[1] * getattr(layer, "groups", 1), *(5,) * (layer.weight.dim() - 2))
    assert both(model, x, backend, runs_on=REFERENCE) == 0.0
    (run,) = layer_runs(model)
    assert run.layer == "0"
    assert why in run.reason


FLOAT_PRODUCTS = [
    ("linear 3-D", LayerSpec(WeightSpec(4)), "its input is not quantized"),
    ("conv strided", LayerSpec(WeightSpec(4)), "its input is not quantized"),
    ("linear 3-D", LayerSpec(WeightSpec(8), ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN)), "ranges per token"),
]


@pytest.mark.parametrize(("name", "spec", "why"), FLOAT_PRODUCTS, ids=str)
def test_what_a_cpu_has_no_integers_for_is_unpacked_to_floats_once(name: str, spec: LayerSpec, why: str) -> None:
    make, shape = LAYERS[name]
    model, _ = quantized(make(), spec)
    assert both(model, noise(*shape), CPU) < TOLERANCE
    (run,) = layer_runs(model)
    stored = 4 * 12 * 40 * (9 if name.startswith("conv") else 1)
    assert run.reason.startswith(f"weights unpacked to float32 in {stored} bytes, float products: {why}")
    packed, _ = quantized(make(), spec)
    (run,) = build_runtime(packed, CPU, memory="packed")
    assert run.backend is REFERENCE
    assert run.reason.startswith(why)


@pytest.mark.skipif(not native.product_level(), reason="no AVX2, or nothing is compiled")
@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3"])
def test_a_layer_whose_integers_were_timed_to_be_slow_is_unpacked_to_floats(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Timings()
    monkeypatch.setattr("quant_core.runtime.build.process_timings", lambda: cache)
    make, shape = LAYERS[name]
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8))
    timed, _ = quantized(make(), spec)
    (run,) = build_runtime(timed, CPU, "auto")
    assert "int8 products" in run.reason or "float products: integers measured" in run.reason
    ((key, _),) = cache.known.items()
    cache.known[key] = (Timing(64, 1, 1.3, None, 1.0, 1.05),)
    model, _ = quantized(make(), spec)
    with torch.no_grad():
        want = model(noise(*shape))
        (run,) = build_runtime(model, CPU, "auto")
        got = model(noise(*shape))
    assert run.backend is CPU
    assert run.reason.startswith("weights unpacked to float32 in ")
    assert run.reason.endswith("float products: integers measured 1.30 of float32 at 64 rows")
    assert float((got - want).abs().max()) < TOLERANCE * float(want.abs().max())
    for asked, memory in (("cpu", "auto"), ("auto", "packed")):
        other, _ = quantized(make(), spec)
        (run,) = build_runtime(other, CPU, asked, memory)
        assert "int8 products" in run.reason, "a choice that times nothing, and one that keeps weights small"


@pytest.mark.parametrize("level", [ProductLevel.NONE, ProductLevel.AVX2], ids=lambda level: level.name)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["linear 3-D", "linear, no bias", "conv 3x3", "conv strided", "conv dilated"])
@pytest.mark.parametrize(
    "activation",
    [
        ActivationSpec(8),
        ActivationSpec(8, step_bits=(8, 4, 6)),
        ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE),
    ],
    ids=str,
)
def test_a_cpu_whose_integers_are_not_exact_has_a_product_of_our_own_or_multiplies_floats(
    name: str, weight: str, activation: ActivationSpec, level: ProductLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.product_level() < level:
        pytest.skip(f"this CPU has no {level.name}")
    monkeypatch.setattr(native, "product_level", lambda: level)
    monkeypatch.setattr(cpu_weight, "sums_pairs_exactly", lambda: False)
    monkeypatch.setattr(cpu_weight, "PAIR_LIMIT", 0)
    make, shape = LAYERS[name]
    model, clock = quantized(make(), LayerSpec(WEIGHTS[weight], activation))
    with torch.no_grad():
        want = [model(noise(*shape)).clone()]
        if not activation.is_dynamic:
            clock.set_timestep(torch.tensor([900.0, 100.0]))
            want.append(model(noise(*shape)))
        (run,) = build_runtime(model, CPU)
        products = "int8" if level and weight != "W4 per group" else "float"  # float scales of groups take two digits
        assert f"{products} products" in run.reason
        assert ("got 'cpu' for weights up to" in run.reason) is (products == "float")
        got = [model(noise(*shape))]
        if not activation.is_dynamic:
            clock.set_timestep(500.0)
            got.insert(0, model(noise(*shape)))
        for mine, theirs in zip(got, want, strict=True):
            assert float((mine - theirs).abs().max()) < TOLERANCE * float(theirs.abs().max())


def test_formats_that_it_does_not_know_run_the_reference() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(ActivationSpec):
        tau: tuple[float, ...] = ()

    for tau, backend in (((1.0, 2.0), REFERENCE), ((), TRITON)):
        model, _ = quantized(nn.Linear(8, 4), LayerSpec(WeightSpec(8), Later(8, tau=tau)))
        (run,) = build_runtime(model, TRITON)
        assert run.backend is backend
        assert ("tau" in run.reason) is (backend is REFERENCE)


def test_a_layer_that_is_being_learned_runs_the_reference() -> None:
    model, _ = quantized(nn.Linear(8, 4), LayerSpec(WeightSpec(8), ActivationSpec(8)))
    model[0].soft_weight = torch.randn(4, 8)
    assert both(model, noise(2, 8), TRITON, runs_on=REFERENCE) == 0.0


def test_a_model_that_was_only_loaded_runs_the_reference() -> None:
    model, _ = quantized(nn.Linear(8, 4), LayerSpec(WeightSpec(8), ActivationSpec(8)))
    assert layer_runs(model) == (LayerRun("0", REFERENCE, "no runtime was built"),)


def test_a_runtime_layer_is_neither_saved_nor_moved() -> None:
    model, _ = quantized(nn.Linear(8, 4), LayerSpec(WeightSpec(8), ActivationSpec(8)))
    build_runtime(model, TRITON)
    with pytest.raises(QuantizationError, match="wanted a model loaded with backend='reference'"):
        model.state_dict()
    with pytest.raises(QuantizationError, match=r"laid out for the triton backend on cpu; wanted .*device='meta'"):
        model.to("meta")
    assert model.half()(noise(2, 8)).dtype is torch.float32


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("timestep", [torch.tensor(500.0), torch.tensor([900.0, 100.0])], ids=["one", "mixed"])
def test_steps_are_found_without_waiting_for_the_device(timestep: Tensor) -> None:
    """On a GPU the clock looks up there; the CPU stands for one, so that reads of values are seen as operators."""
    spec = LayerSpec(WeightSpec(4), ActivationSpec(8, step_bits=(8, 4, 6)))
    model, clock = quantized(nn.Linear(8, 4, bias=False), spec)
    other, slow = quantized(nn.Linear(8, 4, bias=False), spec)
    build_runtime(model, TRITON)
    clock.run_on(torch.device("cpu"))
    x = noise(2, 8)
    with HostReads() as reads, torch.no_grad():
        clock.set_timestep(timestep)
        # The interpreter of Triton reads everything; the reference of the same operators stands for the kernel.
        layer: Any = model[0]
        layer.run = dataclasses.replace(layer.run, backend=REFERENCE)
        got = model(x)
    assert reads.count == 0
    with HostReads() as reads, torch.no_grad():
        slow.set_timestep(timestep)
        want = other(x)
    assert reads.count > 0, "the clock of a CPU does wait"
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(RuntimeError, match="wanted one of the calibrated trajectory"):
        clock.set_timestep(torch.tensor(501.0))


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_a_whole_model_stays_within_rounding(tiny_model: Make, quantize_model: Quantize, family: str) -> None:
    """Rounding moves a few activations across the middle of two codes; so does noise of that size in the reference."""
    model = tiny_model(family)
    quantize_model(model, bits=CPU_BITS)
    generator = torch.Generator().manual_seed(1)
    channels = model.config.in_channels
    inputs = (torch.randn(2, channels, 8, 8, generator=generator), torch.tensor([900, 100]))

    def predict() -> Tensor:
        with torch.no_grad():
            return model(*inputs, class_labels=torch.tensor([0, 3])).sample

    want = predict()
    hooks = [
        module.register_forward_hook(lambda _, __, y: y * (1 + 1e-6 * torch.randn(y.shape, generator=generator)))
        for module in model.modules()
        if isinstance(module, QuantLayer)
    ]
    shaken = predict()
    for hook in hooks:
        hook.remove()
    runs = build_runtime(model, CPU)
    assert {run.backend for run in runs} == {CPU}
    assert float((predict() - want).norm()) <= 3 * float((shaken - want).norm()) + 1e-5 * float(want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_a_runtime_model_compiles_whole(tiny_model: Make, quantize_model: Quantize, family: str) -> None:
    model = tiny_model(family)
    quantize_model(model, bits=CPU_BITS)
    build_runtime(model, CPU)
    x = torch.randn(2, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for timesteps in ([900, 100], [500, 500]):
            arguments = (x, torch.tensor(timesteps))
            want = model(*arguments, class_labels=torch.tensor([0, 3])).sample
            got = compiled(*arguments, class_labels=torch.tensor([0, 3])).sample
            assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()))


def test_blocks_compiled_alone_follow_the_timestep(tiny_model: Make, quantize_model: Quantize) -> None:
    """The model's own forward, which sets the step, is not traced then; a batch of as many samples as steps."""
    model = tiny_model("unet")
    quantize_model(model, bits=CPU_BITS)
    build_runtime(model, CPU)
    x = torch.randn(3, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 1])
    with torch.no_grad():
        wanted = {step: model(x, step, class_labels=labels).sample for step in (900, 100)}
        model.mid_block.resnets[0].compile(backend="aot_eager")
        for step, want in wanted.items():
            got = model(x, step, class_labels=labels).sample
            assert float((got - want).norm()) < 1e-3 * float(want.norm())


def test_a_model_whose_layers_hold_everything_still_says_its_dtype() -> None:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        add_attention=False,
    ).eval()
    clock = StepClock(())
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        made = QuantLayer(layer.requires_grad_(False), LayerSpec(WeightSpec(CPU_BITS), A8_STATIC), clock)
        replace_module(model, name, made)
    x = noise(1, 3, 8, 8)
    with torch.no_grad():
        want = model(x, 500).sample
        runs = build_runtime(model, CPU)
        assert {run.backend for run in runs} == {CPU}
        assert (model.dtype, model.device.type) == (torch.float32, "cpu")
        assert torch.allclose(model(x, 500).sample, want, atol=1e-3)


@pytest.mark.parametrize("weight", ["W4 per channel", "W4 per group", "W4 multiplied"])
@pytest.mark.parametrize("kind", ["linear 3-D", "conv 3x3"])
def test_unpacked_weights_give_what_packed_ones_give(weight: str, kind: str) -> None:
    layer, shape = LAYERS[kind]
    x, given = torch.randn(shape, generator=torch.Generator().manual_seed(1)), {}
    for memory in ("packed", "fast"):
        torch.manual_seed(0)  # of the bias
        model, _ = quantized(layer(), LayerSpec(WEIGHTS[weight], ActivationSpec(8)))
        build_runtime(model, TRITON, memory=memory)
        assert ("8-bit weights unpacked" in model[0].run.reason) is (memory == "fast"), model[0].run.reason
        assert "bytes" in model[0].run.reason
        given[memory] = model(x)
    assert (given["fast"] - given["packed"]).abs().max() <= TOLERANCE * given["packed"].abs().max()


def test_a_cpu_says_how_weights_lie_in_memory() -> None:
    """A byte a weight and 12 for each row of them, of float scales of groups twice; small weights are kept twice."""
    stored = 624 + 480 * bool(native.product_level())
    for name, wanted in {
        "W4 multiplied": f"8-bit weights unpacked from fewer bits in {stored} bytes, int8 products",
        "W4 per group": "2 digits of 8-bit weights unpacked from fewer bits in 1248 bytes, int8 products",
        "W8 symmetric": f"8-bit weights in {stored} bytes, int8 products",
    }.items():
        model, _ = quantized(nn.Linear(40, 12), LayerSpec(WEIGHTS[name], ActivationSpec(8)))
        (run,) = build_runtime(model, CPU)
        if "saturate" not in run.reason:
            assert run.reason == wanted


def test_weights_stay_packed_where_no_faster_way_was_measured() -> None:
    model, _ = quantized(nn.Linear(40, 12), LayerSpec(WEIGHTS["W4 per channel"], ActivationSpec(8)))
    build_runtime(model, TRITON)
    assert model[0].run.reason.startswith("4-bit weights in ")


def test_memory_is_one_of_its_names() -> None:
    model, _ = quantized(nn.Linear(40, 12), LayerSpec(WEIGHTS["W4 per channel"], ActivationSpec(8)))
    with pytest.raises(QuantizationError, match="memory: got 'little', wanted one of auto, packed, fast"):
        build_runtime(model, TRITON, memory="little")
