"""One step of a denoiser of full size with random weights on a GPU: packed against bfloat16.

    python -m benchmarks.gpu_step [--models sdxl dit-xl flux] [--batches 1 4] [--latents 128] [--repeats 10]
        [--formats W8A8 W4A8] [--compile] [--compile-blocks] [--out FILE]

Models are SDXL's UNet, DiT-XL, and a stack of 3 + 6 of Flux's blocks (`benchmarks.stacks`). Each is called as it is,
and from a CUDA graph that was captured once; with --compile-blocks the bfloat16 one also with its repeated blocks
compiled (`torch.compile`, a graph for each class of block), under a CUDA graph, which is the second one to compare
with; with --compile also compiled whole, which takes minutes, and captured. All of one batch size take turns,
`--repeats` times, timed by CUDA events; the median counts. Prints one JSON document: milliseconds and what is in memory
after loading. `speedup` is over bfloat16 in the same way of calling. Weights and codes are random, scaled so that
activations keep their size, so times are those of a trained model and images mean nothing. All Linear and Conv2d layers
are packed but those that take in and give out samples; every input has a range for each of 20 steps; attention products
are in bfloat16. The captured graph runs at two timesteps, and must then give what the model gives without it.

Peak memory is some 30 GiB, of the bfloat16 model and one packed one.
"""

from __future__ import annotations

import argparse
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
from benchmarks.stacks import STACKS, Stack
from benchmarks.timing import idle_cuda_ms, take_turns
from quant_core import layer_runs
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QUANTIZABLE, QuantLayer
from quant_core.nn.model import build_quantized
from quant_core.runtime.build import build_runtime
from quant_spec.enums import Granularity, GroupScale, KernelBackend
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from workers.tasks.ways import GraphError, Replayed, check_replay, compile_model, compiling_each_shape

Call = Callable[[], Tensor]
HALF = torch.bfloat16
STEPS = tuple(float(t) for t in range(951, 0, -50))
FORMATS = {
    "W8A8": WeightSpec(8),
    "W4A8": WeightSpec(4),
    "W4A8 g64 of integers": WeightSpec(
        4, granularity=Granularity.PER_GROUP, group_size=64, group_scale=GroupScale.INTEGER
    ),
    "W4A8 g128": WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=128),
}


def half_model(stack: Stack, device: str) -> nn.Module:
    """Return the model in bfloat16, channels last."""
    model = stack.build(stack.shapes).to(HALF).to_empty(device=device)
    _fill_floats(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def packed_model(stack: Stack, weight: WeightSpec, device: str, backend: KernelBackend) -> nn.Module:
    """Return the model with packed layers; what is not packed is in bfloat16."""
    model = stack.build(stack.shapes)
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZABLE))
    names = [name for name, _ in named if name not in stack.floats]
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
    for buffer in model.buffers():
        buffer.zero_()
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
    if layer.spec.weight.is_multiplied:  # stored less 1; the codes' spread is that of the multipliers' mean
        layer.multiplier.fill_(7)
        layer.scale.div_(8)
    if layer.bias is not None:
        layer.bias.zero_()


def ways(
    model: nn.Module, told: dict[str, Any], compile_too: bool, blocks_too: bool = False
) -> Iterator[tuple[str, Call]]:
    """Yield the ways in which a model is called; the last one compiles the blocks that it repeats, in place."""

    def call(of: Callable[..., Any]) -> Call:
        return lambda: of(**told, return_dict=False)[0]

    yield "eager", call(model)
    yield "CUDA graph", checked(call(model), call(Replayed(model)), told)
    if compile_too:
        compiled = torch.compile(model, fullgraph=True)
        yield "compiled", call(compiled)
        yield "compiled, CUDA graph", checked(call(compiled), call(Replayed(compiled)), told)
    if blocks_too:
        compile_model(model, torch.device("cuda"))
        yield "compiled by block, CUDA graph", checked(call(model), call(Replayed(model)), told)


def checked(run: Call, replay: Call, told: dict[str, Any]) -> Call:
    """Return a replay of `run`, after checking that it follows the timestep."""
    for timestep in (STEPS[3], STEPS[9]):
        told["timestep"].fill_(timestep)
        try:
            check_replay(run, replay)
        except GraphError as error:
            raise SystemExit(f"timestep {timestep}: {error}") from error
    return replay


def measure(stack: Stack, name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a format beside bfloat16 at one batch size."""
    latents = options.latents or stack.shapes.get("sample_size", 128)
    told = stack.told(stack.shapes, batch, latents, "cuda")
    told["timestep"].fill_(STEPS[9])
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    print(f"batch {batch}, {name}: building", file=sys.stderr)
    packed = packed_model(stack, FORMATS[name], "cuda", KernelBackend.TRITON)
    packed_bytes = torch.cuda.memory_allocated() - before
    plain = half_model(stack, "cuda")
    plain_bytes = torch.cuda.memory_allocated() - before - packed_bytes
    print(f"batch {batch}, {name}: compiling and capturing", file=sys.stderr)
    calls = {f"bfloat16, {way}": run for way, run in ways(plain, told, options.compile, options.compile_blocks)}
    calls |= {f"{name}, {way}": run for way, run in ways(packed, told, options.compile)}
    if options.compile_blocks:
        del calls["bfloat16, eager"]  # its blocks are compiled by now
    seen = take_turns(calls, options.repeats, idle_cuda_ms, progress=True)
    return figures(name, {key: statistics.median(each) for key, each in seen.items()}) | {
        "loaded_bytes": {"bfloat16": plain_bytes, name: packed_bytes},
        "layers": dict(Counter(str(run.backend) for run in layer_runs(packed))),
    }


def figures(name: str, times: dict[str, float]) -> dict[str, Any]:
    """Return milliseconds and speed over bfloat16 in the same way of calling; a graph also over one of its blocks."""
    ours = {key.removeprefix(f"{name}, "): ms for key, ms in times.items() if key.startswith(f"{name}, ")}
    plain = {key.removeprefix("bfloat16, "): ms for key, ms in times.items() if key.startswith("bfloat16, ")}
    speedup = {way: round(plain[way] / ms, 3) for way, ms in ours.items() if way in plain}
    by_block = plain.get("compiled by block, CUDA graph")
    if by_block is not None:
        speedup["CUDA graph over compiled by block"] = round(by_block / ours["CUDA graph"], 3)
    return {"ms": {key: round(ms, 3) for key, ms in times.items()}, "speedup": speedup}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of this module's docstring."""
    command = parser(__doc__)
    command.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    command.add_argument("--models", nargs="+", choices=STACKS, default=["sdxl"])
    command.add_argument("--latents", type=int, help="side of the latents; by default the model's own")
    command.add_argument("--repeats", type=int, default=10)
    command.add_argument("--compile", action="store_true", help="also with torch.compile")
    command.add_argument("--compile-blocks", action="store_true", help="bfloat16 also with its blocks compiled")
    command.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    command.add_argument("--out", type=Path)
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    import triton

    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"device": device, "latents": options.latents, "models": {}}
    with torch.no_grad(), compiling_each_shape():
        for model in options.models:
            for batch in options.batches:
                results = found["models"].setdefault(model, {}).setdefault(str(batch), {})
                for name in options.formats:
                    results[name] = measure(STACKS[model], name, batch, options)
                    if options.out:  # so that what is cut keeps what it has
                        keep(found, options.out)
    give(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
