"""Bench: a release and its original in float32, bfloat16 and compiled bfloat16, measured side by side in one process.

It has no outputs: what it measures is of this machine at this moment, so it is never queued or recorded. Metrics:

device, threads, dtype (what the release computes in between its layers), backend (what its choice comes to)
layers: backend to number of layers
way: how models are called, all alike: "eager", as they are, or on a GPU replayed from a "CUDA graph"
graph_error: why there is no graph on a GPU; else null
compiled_way: whether the compiled original was compiled "whole" or, on a GPU, "by block" (each one that it repeats)
release_figures, original_figures (float32), bf16_figures, bf16_compiled_figures (null if not measured), each with
    step_ms: batch size (as text) to the median milliseconds of one denoiser call
    eager_step_ms: the same called as it is, where `way` is another one; else, and of the compiled original, null
    images_per_second: samples by the whole sampler, at the largest batch
    peak_memory_bytes: the most that loading and one call at the largest batch took; null of the compiled model, whose
    compiler runs in this process
    bytes: size of the release's weights file; of all weights in float32, in bfloat16
compile_error: why the compiled original was not measured though it was asked for; else null

The float models have their images in channels-last order, which is the faster one. On a GPU the release computes in
bfloat16 between its layers, on a CPU in float32.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import resolve_backend
from quant_core.artifact.folder import WEIGHTS_FILE, packed_home
from quant_core.diffusion.conditioning import dummy_conditioning, is_shared, to_device
from quant_core.diffusion.denoiser import call_denoiser, load_denoiser, sample_shape
from quant_core.diffusion.sampler import (
    make_scheduler,
    model_timestep,
    sample,
    start,
    token_count,
    trajectory_conditioning,
)
from quant_core.runtime.build import layer_runs
from quant_core.runtime.loader import check_device, load_runtime
from quant_core.runtime.memory import return_free_memory
from quant_core.runtime.replayed import Replayed
from quant_spec.enums import KernelBackend
from quant_spec.sampler import Sampler
from quant_spec.tasks.bench import BENCHED, COMPILED, EAGER, GRAPH, HALF, ORIGINAL, RELEASE, Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree
from workers.tasks.device import device_name
from workers.tasks.ways import (
    GraphError,
    check_replay,
    choose_way,
    compile_model,
    compiling_each_shape,
)

_LEAST_CALLS, _TURNS = 3, 2


@dataclass(frozen=True, slots=True)
class _Bench:
    """What both models are measured with."""

    device: torch.device
    sampler: Sampler
    scheduler_config: Mapping[str, Any] | None
    conditioning: Path | None
    is_whole: bool
    batches: tuple[int, ...]
    seconds: float


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Measure the release and the original."""
    folders = {name: context.scratch / name for name in ("artifact", "model")}
    link_tree(context.store, inputs.artifact, folders["artifact"])
    link_tree(context.store, inputs.model, folders["model"])
    device = check_device(context.device)
    backend = resolve_backend(params.backend, device)
    original = load_denoiser(folders["model"])
    weights = sum(parameter.numel() for parameter in original.model.parameters())
    bench = _Bench(
        device=device,
        sampler=params.sampler,
        scheduler_config=original.scheduler_config,
        conditioning=original.conditioning,
        is_whole=original.is_whole,
        batches=params.batches,
        seconds=params.seconds,
    )
    torch.set_num_threads(context.threads)
    del original
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaders = _loaders(folders, backend, params.backend, device, dtype)
    for load in loaders.values():
        _call(bench, load(), max(bench.batches))()  # libraries are set up once, for whoever comes first
    peaks: dict[str, int | None] = {name: _peak_bytes(bench, load) for name, load in loaders.items()}
    with compiling_each_shape():
        found = _measured(bench, loaders, compiles=params.compile)
    sizes = {name: weights * (4 if name == ORIGINAL else 2) for name in BENCHED.values()}
    sizes[RELEASE] = (packed_home(folders["artifact"]) / WEIGHTS_FILE).stat().st_size
    figures = {
        name: {**found.figures[name], "peak_memory_bytes": peaks.get(name), "bytes": sizes[name]}
        for name in found.figures
    }
    where = {"device": device_name(device), "threads": torch.get_num_threads(), "dtype": str(dtype).split(".")[-1]}
    return TaskOutput({}, {**where, "backend": str(backend), **found.how, COMPILED: None, **figures})


@dataclass(frozen=True, slots=True)
class _Found:
    """What was measured of each model, and how."""

    figures: dict[str, dict[str, Any]]
    how: dict[str, Any]


def _measured(bench: _Bench, loaders: Mapping[str, Callable[[], nn.Module]], *, compiles: bool) -> _Found:
    """Load the models and time them in the way that suits the device; the original compiled too, where it can be."""
    models = {name: load() for name, load in loaders.items()}
    layers = dict(Counter(str(run.backend) for run in layer_runs(models[RELEASE])))
    way, graph_error = choose_way(bench.device, models.values())
    eager: Mapping[str, Mapping[str, float]] = {}
    if way == GRAPH:
        eager = _step_ms(bench, models)
        models, graph_error = _replayed(bench, models)
        way = EAGER if graph_error is not None else GRAPH
    compiled_way = compile_error = None
    if compiles:
        compiled, compiled_way, compile_error = _compiled(bench, loaders[HALF](), way)
        if compile_error is None:
            models[COMPILED] = compiled
    times, speeds = _step_ms(bench, models), _images_per_second(bench, models)
    figures = {
        name: {
            "step_ms": times[name],
            "eager_step_ms": eager.get(name) if way == GRAPH else None,
            "images_per_second": speeds[name],
        }
        for name in models
    }
    how = {"layers": layers, "way": way, "graph_error": graph_error}
    return _Found(figures, how | {"compiled_way": compiled_way, "compile_error": compile_error})


def _replayed(bench: _Bench, models: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], str | None]:
    """Return the models called from CUDA graphs; or as they are, and why one of them can't be."""
    replayed = {name: Replayed(model).eval() for name, model in models.items()}
    try:
        for name, model in models.items():
            for batch in bench.batches:
                run, replay = (_call(bench, each, batch) for each in (model, replayed[name]))
                for _ in range(2):  # of which the second one is at another timestep
                    check_replay(run, replay)
    except (GraphError, RuntimeError) as error:
        return models, _in_a_line(error)
    return dict(replayed), None


def _loaders(
    folders: Mapping[str, Path], backend: KernelBackend, asked: KernelBackend, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], nn.Module]]:
    """Return what loads each model, on the device and ready to run."""

    def release() -> nn.Module:
        model = load_runtime(folders["artifact"], device, backend, asked=asked, dtype=dtype)
        return model if dtype is torch.float32 else _with_float32_ends(model, dtype)

    def original() -> nn.Module:
        model: nn.Module = load_denoiser(folders["model"]).model
        return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    return {
        RELEASE: release,
        ORIGINAL: original,
        HALF: lambda: _with_float32_ends(original().to(torch.bfloat16), torch.bfloat16),
    }


def _with_float32_ends(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a model that computes in `dtype` take and give float32, as the samplers here do."""

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, dict):
            return {name: cast(item, dtype) for name, item in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # bfloat16 has no 999
        return args, {name: v if "timestep" in name else cast(v, dtype) for name, v in kwargs.items()}

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return tuple(cast(item, torch.float32) for item in output) if isinstance(output, tuple) else output.float()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    return model


def _call(bench: _Bench, model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """Return what calls the denoiser as the sampler does for a batch of seeds, at one step after another."""
    conditioning = _conditioning(bench, model, range(batch))
    shape = sample_shape(model, token_count(conditioning))
    timesteps = start(make_scheduler(bench.sampler, bench.scheduler_config), bench.sampler, shape)
    # In the order of a trajectory, again and again: a model may hold differences between its steps.
    moments = itertools.cycle(model_timestep(timesteps, bench.sampler).to(bench.device))
    rows = batch * (2 if bench.sampler.is_guided else 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    conditioning = to_device(conditioning, bench.device)

    @torch.no_grad()
    def call() -> Tensor:
        prediction = call_denoiser(model, x, next(moments), conditioning)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return prediction

    return call


def _conditioning(bench: _Bench, model: nn.Module, seeds: range) -> dict[str, Tensor]:
    """Return what the denoiser is told for some seeds; zeros for a whole pipeline's: values take no time."""
    if not bench.is_whole:
        return trajectory_conditioning(model, bench.sampler, seeds, bench.conditioning)
    rows = len(seeds) * bench.sampler.calls_per_step
    return {
        key: value if is_shared(key) else value.expand(rows, *value.shape[1:]).clone()
        for key, value in dummy_conditioning(model).items()
    }


def _compiled(bench: _Bench, model: nn.Module, way: str) -> tuple[nn.Module, str | None, str | None]:
    """Compile a model by calling it; return how much of it was, or why that can't be done here."""
    compiled_way = compile_model(model, bench.device)
    called = Replayed(model).eval() if way == GRAPH else model
    try:
        _call(bench, called, min(bench.batches))()
    except Exception as error:  # whatever the compiler that it finds here may raise
        return model, None, _in_a_line(error)
    return called, compiled_way, None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _step_ms(bench: _Bench, models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Time one call at each batch size, the models taking turns so that whatever else the machine does meets both."""
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for batch in bench.batches:
        calls = {name: _call(bench, model, batch) for name, model in models.items()}
        seen: dict[str, list[float]] = {name: [] for name in models}
        for call in calls.values():
            call()
        while any(len(times) < _LEAST_CALLS or sum(times) < bench.seconds for times in seen.values()):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                seen[name].append(time.perf_counter() - started)
        for name, times in seen.items():
            result[name][str(batch)] = 1000 * statistics.median(times)
    return result


def _images_per_second(bench: _Bench, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Draw one batch with the whole sampler, the models taking turns; the best of each counts."""
    seeds = range(max(bench.batches))
    scheduler = make_scheduler(bench.sampler, bench.scheduler_config)
    best = dict.fromkeys(models, 0.0)
    for _ in range(_TURNS):
        for name, model in models.items():
            conditioning = _conditioning(bench, model, seeds)
            started = time.perf_counter()
            sample(model, scheduler, bench.sampler, seeds, conditioning, batch_size=len(seeds))
            best[name] = max(best[name], len(seeds) / (time.perf_counter() - started))
    return best


def _peak_bytes(bench: _Bench, load: Callable[[], nn.Module]) -> int:
    """Return how much more memory was in use at most while a model was loaded and called once."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    else:
        return_free_memory()  # so that the next model's pages count as new
        before = _reset_resident_peak()
    model = load()
    _call(bench, model, max(bench.batches))()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated(bench.device) - before
    return _status_bytes("VmHWM") - before


def _reset_resident_peak() -> int:
    """Start the count of this process's resident peak anew, and return what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
