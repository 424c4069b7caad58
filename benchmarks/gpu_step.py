"""One step of a UNet of SDXL's size with random weights on a GPU: packed against bfloat16.

    python -m benchmarks.gpu_step [--batches 1 4] [--latents 128] [--repeats 10] [--formats W8A8 W4A8] [--compile]
        [--out FILE]

Each model is called as it is, and from a CUDA graph that was captured once; with --compile also compiled
(`torch.compile`, default mode, which takes minutes), and compiled and captured. All of one batch size take turns,
`--repeats` times, timed by CUDA events; the median counts. Prints one JSON document: milliseconds and what is in memory
after loading. `speedup` is over bfloat16 in the same way of calling. Weights and codes are random, scaled so that
activations keep their size, so times are those of a trained model and images mean nothing. All Linear and Conv2d layers
but the first and the last convolution are packed; every input has a range for each of 20 steps; attention products are
in bfloat16. The captured graph runs at two timesteps, and must then give what the model gives without it.

Peak memory is some 30 GiB, of the bfloat16 model and one packed one.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cli import give, keep, parser
from benchmarks.sdxl import SDXL, meta_unet
from benchmarks.timing import captured, idle_cuda_ms, take_turns
from quant_core import layer_runs
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QUANTIZABLE, QuantLayer
from quant_core.nn.model import build_quantized
from quant_core.runtime.build import build_runtime
from quant_spec.enums import Granularity, KernelBackend
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec

Call = Callable[[], Tensor]
HALF = torch.bfloat16
STEPS = tuple(float(t) for t in range(951, 0, -50))
FORMATS = {
    "W8A8": WeightSpec(8),
    "W4A8": WeightSpec(4),
    "W4A8 g128": WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=128),
}
# Kernels are the same with and without a graph, but libraries may choose others for it; a wrong step is far beyond.
GRAPH_TOLERANCE = 0.01
_FLOAT_LAYERS = ("conv_in", "conv_out")


def half_unet(shapes: dict[str, Any], device: str) -> nn.Module:
    """Return the UNet in bfloat16, channels last."""
    model = meta_unet(shapes).to(HALF).to_empty(device=device)
    _fill_floats(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def packed_unet(shapes: dict[str, Any], weight: WeightSpec, device: str, backend: KernelBackend) -> nn.Module:
    """Return the UNet with packed layers; what is not packed is in bfloat16."""
    model = meta_unet(shapes)
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZABLE))
    names = [name for name, _ in named if name not in _FLOAT_LAYERS]
    spec = LayerSpec(weight, ActivationSpec(8))
    build_quantized(model, ModelFormat(dict.fromkeys(names, spec), {}, STEPS))
    model = model.to_empty(device=device)
    _fill_floats(model)
    for module in model.modules():
        if isinstance(module, QuantLayer):
            _fill_codes(module)
        elif isinstance(module, ActivationQuantizer):
            module.scale.copy_(torch.linspace(8 / 255, 12 / 255, len(module.scale)))
            module.zero_point.fill_(128)
    build_runtime(model, backend)
    return model.to(HALF).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _fill_floats(model: nn.Module) -> None:
    """Give weights a spread of 1 / sqrt(inputs), norms 1, everything else 0."""
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            tensor.data.normal_(std=tensor[0].numel() ** -0.5)
        else:
            tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)


def _fill_codes(layer: QuantLayer) -> None:
    """Give random codes the same spread; uniform ones of n levels have n / sqrt(12)."""
    levels = 2**layer.spec.weight.bits
    layer.qweight.random_(0, 256)
    layer.zero_point.fill_(levels // 2)
    layer.scale.fill_(12**0.5 / levels * layer.columns**-0.5)
    if layer.bias is not None:
        layer.bias.zero_()


def inputs(shapes: dict[str, Any], batch: int, latents: int, device: str) -> dict[str, Any]:
    """Return what the UNet is called with; its timestep is a tensor on the device."""
    draw = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=HALF)

    pooled = shapes["projection_class_embeddings_input_dim"] - 6 * shapes["addition_time_embed_dim"]
    image = noise(batch, shapes["in_channels"], latents, latents).contiguous(memory_format=torch.channels_last)
    added = {"text_embeds": noise(batch, pooled), "time_ids": torch.zeros(batch, 6, device=device, dtype=HALF)}
    return {
        "sample": image,
        "timestep": torch.tensor(STEPS[9], device=device),
        "encoder_hidden_states": noise(batch, 77, shapes["cross_attention_dim"]),
        "added_cond_kwargs": added,
    }


def ways(model: nn.Module, told: dict[str, Any], compile_too: bool) -> Iterator[tuple[str, Call]]:
    """Yield the ways in which a model is called."""

    def call(of: Callable[..., Any]) -> Call:
        return lambda: of(**told, return_dict=False)[0]

    yield "eager", call(model)
    yield "CUDA graph", replayed(call(model), told)
    if compile_too:
        compiled = call(torch.compile(model, fullgraph=True))
        yield "compiled", compiled
        yield "compiled, CUDA graph", replayed(compiled, told)


def replayed(run: Call, told: dict[str, Any]) -> Call:
    """Return a replay of `run`, after checking that it follows the timestep."""
    replay = captured(run)
    for timestep in (STEPS[3], STEPS[9]):
        told["timestep"].fill_(timestep)
        want, got = run(), replay()
        off = float((got.float() - want.float()).norm() / want.float().norm())
        if not off <= GRAPH_TOLERANCE:
            raise SystemExit(f"CUDA graph at timestep {timestep}: got a relative difference of {off:g}, wanted none")
    return replay


def measure(
    formats: Sequence[str], batch: int, latents: int, repeats: int, results: dict[str, Any], compile_too: bool
) -> None:
    """Measure the formats at one batch size, each beside bfloat16, into `results`."""
    told = inputs(SDXL, batch, latents, "cuda")
    for name in formats:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        print(f"batch {batch}, {name}: building", file=sys.stderr)
        packed = packed_unet(SDXL, FORMATS[name], "cuda", KernelBackend.TRITON)
        packed_bytes = torch.cuda.memory_allocated() - before
        plain = half_unet(SDXL, "cuda")
        plain_bytes = torch.cuda.memory_allocated() - before - packed_bytes
        print(f"batch {batch}, {name}: compiling and capturing", file=sys.stderr)
        models = {"bfloat16": plain, name: packed}
        calls = {f"{model}, {way}": run for model, each in models.items() for way, run in ways(each, told, compile_too)}
        seen = take_turns(calls, repeats, idle_cuda_ms, progress=True)
        times = {key: statistics.median(each) for key, each in seen.items()}
        results[name] = {
            "ms": {key: round(ms, 3) for key, ms in times.items()},
            "speedup": {
                way: round(times[f"bfloat16, {way}"] / times[f"{name}, {way}"], 3)
                for way in (key.removeprefix(f"{name}, ") for key in times if key.startswith(f"{name}, "))
            },
            "loaded_bytes": {"bfloat16": plain_bytes, name: packed_bytes},
            "layers": dict(Counter(str(run.backend) for run in layer_runs(packed))),
        }
        del packed, plain, models, calls


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    command.add_argument("--latents", type=int, default=SDXL["sample_size"])
    command.add_argument("--repeats", type=int, default=10)
    command.add_argument("--compile", action="store_true", help="also with torch.compile")
    command.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    command.add_argument("--out", type=Path)
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    import triton

    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"device": device, "latents": options.latents, "batches": {}}
    with torch.no_grad():
        for batch in options.batches:
            results = found["batches"].setdefault(str(batch), {})
            for name in options.formats:
                measure([name], batch, options.latents, options.repeats, results, options.compile)
                if options.out:  # so that what is cut keeps what it has
                    keep(found, options.out)
    give(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
