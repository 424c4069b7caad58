"""One step of a denoiser of full size with random weights on a GPU: packed against bfloat16.

    python -m benchmarks.gpu_step [--models sdxl dit-xl sd3 flux] [--batches 1 4] [--latents 128] [--repeats 10]
        [--formats W8A8 W4A8 FP8] [--compile] [--compile-blocks] [--kernels] [--turn FILE] [--others N] [--after FILE]
        [--out FILE]

Models are SDXL's UNet, DiT-XL, and stacks of 8 of SD3's and of 3 + 6 of Flux's blocks (`benchmarks.stacks`). Each is
called as it is, and from a CUDA graph that was captured once; with --compile-blocks the bfloat16 one also with its
repeated blocks compiled (`torch.compile`, a graph for each class of block), under a CUDA graph, which is the second one
to compare with; with --compile also compiled whole, which takes minutes, and captured. All formats of one batch size
take turns, `--repeats` times, timed by CUDA events; the median counts. Prints one JSON document: milliseconds and what
is in memory after loading; with --kernels also which kernels a replay of each graph spends its time in. `speedup` is
over bfloat16 in the same way of calling. Weights and codes are random, scaled so that activations keep their size, so
times are those of a trained model and images mean nothing. All Linear and Conv2d layers are packed but those that take
in and give out samples; every input has a range for each of 20 steps, FP8 ones each token's own; attention products are
in bfloat16. The captured graph runs at two timesteps, and must then give what the model gives without it. A format
whose name ends in ", packed" keeps its weights packed (`load_quantized(memory="packed")`).

With --turn, a file that is locked while something is timed; with --others, it waits first until so many others that
name the file have built and compiled what they time, since that uses the device too. With --after, packed models are
built once that file is there: tiles may be tuned meanwhile.
Peak memory is some 40 GiB, of SDXL in bfloat16 and in three formats.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from quant_core.runtime.replayed import Replayed
from quant_spec.enums import ActivationMode, Granularity, GroupScale, KernelBackend, NumberType, WeightMemory
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from workers.tasks.ways import GraphError, check_replay, compile_model, compiling_each_shape

Call = Callable[[], Tensor]
HALF = torch.bfloat16
STEPS = tuple(float(t) for t in range(951, 0, -50))
_INT8 = ActivationSpec(8)
FORMATS = {
    "W8A8": LayerSpec(WeightSpec(8), _INT8),
    "W4A8": LayerSpec(WeightSpec(4), _INT8),
    "W4A8 g64 of integers": LayerSpec(
        WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=64, group_scale=GroupScale.INTEGER), _INT8
    ),
    "W4A8 g128": LayerSpec(WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=128), _INT8),
    "FP8": LayerSpec(
        WeightSpec(8, type=NumberType.E4M3),
        ActivationSpec(8, type=NumberType.E4M3, mode=ActivationMode.DYNAMIC_TOKEN),
    ),
}
PACKED = ", packed"
FORMATS |= {f"{name}{PACKED}": FORMATS[name] for name in ("W4A8", "W4A8 g64 of integers")}
#: How long others are waited for.
READY_SECONDS = 120
#: What replays spend most of their time in, in the document.
KERNELS = 25


def half_model(stack: Stack, device: str) -> nn.Module:
    """Return the model in bfloat16, channels last."""
    model = stack.build(stack.shapes).to(HALF).to_empty(device=device)
    _fill_floats(model)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def packed_model(stack: Stack, name: str, device: str, backend: KernelBackend) -> nn.Module:
    """Return the model with packed layers of a format; what is not packed is in bfloat16."""
    model, spec = stack.build(stack.shapes), FORMATS[name]
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, QUANTIZABLE))
    names = [name for name, _ in named if name not in stack.floats]
    build_quantized(model, ModelFormat(dict.fromkeys(names, spec), {}, STEPS))
    model = model.to_empty(device=device)
    _fill_floats(model)
    for module in model.modules():
        if isinstance(module, QuantLayer):
            _fill_codes(module)
        elif isinstance(module, ActivationQuantizer) and not module.spec.is_dynamic:
            module.scale.copy_(torch.linspace(8 / 255, 12 / 255, len(module.scale)))
            module.zero_point.fill_(128)
    build_runtime(model, backend, memory=WeightMemory.PACKED if name.endswith(PACKED) else WeightMemory.AUTO)
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
    if layer.spec.weight.is_float:
        layer.qweight.copy_(torch.randn(layer.qweight.shape, device=layer.qweight.device).mul_(64).clamp_(-448, 448))
        layer.scale.fill_(layer.columns**-0.5 / 64)
        if layer.bias is not None:
            layer.bias.zero_()
        return
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


def wait_for(event: Callable[[], bool]) -> None:
    """Wait until something happened, READY_SECONDS at most."""
    deadline = time.monotonic() + READY_SECONDS
    while not event() and time.monotonic() < deadline:
        time.sleep(0.1)


@contextmanager
def turn(path: Path | None, others: int) -> Iterator[None]:
    """Lock a file, if one is named, so that nothing else that does is timed meanwhile, once all are ready."""
    if path is None:
        yield
        return
    path.with_name(f"{path.name}.ready.{os.getpid()}").touch()
    wait_for(lambda: len(list(path.parent.glob(f"{path.name}.ready.*"))) > others)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kernel_times(replay: Call) -> dict[str, Any]:
    """Return which kernels one replay of a graph spends its time in: name, launches and microseconds, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA":
            each = spent.setdefault(event.name, [0, 0.0])
            each[0] += 1
            each[1] += event.device_time
    longest = sorted(spent.items(), key=lambda item: -item[1][1])
    return {
        "us": round(sum(us for _, (_, us) in longest)),
        "launches": int(sum(count for _, (count, _) in longest)),
        "longest": [[name[:120], int(count), round(us)] for name, (count, us) in longest[:KERNELS]],
    }


def measure(stack: Stack, names: Sequence[str], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure formats beside bfloat16 at one batch size."""
    latents = options.latents or stack.shapes.get("sample_size", 128)
    told = stack.told(stack.shapes, batch, latents, "cuda")
    told["timestep"].fill_(STEPS[9])
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    models: dict[str, nn.Module] = {}
    loaded: dict[str, int] = {}
    calls: dict[str, Call] = {}
    for name in ("bfloat16", *names):
        if name == names[0] and options.after is not None:
            wait_for(lambda: options.after.exists())
        print(f"batch {batch}, {name}: building, compiling and capturing", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        packed = name != "bfloat16"
        model = packed_model(stack, name, "cuda", KernelBackend.TRITON) if packed else half_model(stack, "cuda")
        models[name], loaded[name] = model, torch.cuda.memory_allocated() - before
        blocks_too = options.compile_blocks and name == "bfloat16"
        calls |= {f"{name}, {way}": run for way, run in ways(model, told, options.compile, blocks_too)}
    if options.compile_blocks:
        del calls["bfloat16, eager"]  # its blocks are compiled by now
    with turn(options.turn, options.others):
        seen = take_turns(calls, options.repeats, idle_cuda_ms, progress=True)
        graphs = {name: run for name, run in calls.items() if name.endswith("graph")} if options.kernels else {}
        kernels = {name: kernel_times(run) for name, run in graphs.items()}
    times = {key: statistics.median(each) for key, each in seen.items()}
    found = {
        name: figures(name, times)
        | {
            "loaded_bytes": {each: loaded[each] for each in ("bfloat16", name)},
            "layers": dict(Counter(str(run.backend) for run in layer_runs(models[name]))),
        }
        for name in names
    }
    return found | ({"kernels": kernels} if kernels else {})


def figures(name: str, times: dict[str, float]) -> dict[str, Any]:
    """Return milliseconds and speed over bfloat16 in the same way of calling; a graph also over one of its blocks."""
    times = {key: ms for key, ms in times.items() if key.startswith((f"{name}, ", "bfloat16, "))}
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
    command.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=[each for each in FORMATS if PACKED not in each]
    )
    command.add_argument("--kernels", action="store_true", help="also what replays spend their time in")
    command.add_argument("--turn", type=Path, help="a file to lock while something is timed")
    command.add_argument("--others", type=int, default=0, help="processes that name the same file, and are waited for")
    command.add_argument("--out", type=Path)
    command.add_argument("--after", type=Path, help="a file to wait for before packed models are built")
    options = command.parse_args(arguments)
    if not torch.cuda.is_available():
        command.error("device: got no GPU, wanted one that Triton compiles for")
    import triton

    device = {"name": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    found: dict[str, Any] = {"device": device, "latents": options.latents, "models": {}}
    with torch.no_grad(), compiling_each_shape():
        for model in options.models:
            for batch in options.batches:
                results = measure(STACKS[model], options.formats, batch, options)
                found["models"].setdefault(model, {})[str(batch)] = results
                if options.out:  # so that what is cut keeps what it has
                    keep(found, options.out)
    give(found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
