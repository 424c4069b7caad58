"""Bench: a release and its full-precision original, measured side by side in one process.

params
    sampler: as in a recipe; batches: batch sizes whose step is timed; seconds: how long each is timed at least
inputs
    artifact: the release's tree; model: the original's tree
outputs
    none: what it measures is of this machine at this moment, so it is never queued or recorded
metrics
    device, threads, backend, release_figures and original_figures, each with
    step_ms: batch size (as text) to the median milliseconds of one denoiser call
    images_per_second: samples by the whole sampler, at the largest batch
    peak_memory_bytes: the most that loading and one call at the largest batch took
    bytes: size of the weights file(s)
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import KernelBackend, resolve_backend
from quant_core.conditioning import to_device
from quant_core.denoiser import Denoiser, call_denoiser, load_denoiser, sample_shape
from quant_core.loader import load_folder
from quant_core.sampler import SamplerSpec, make_scheduler, sample, start, token_count, trajectory_conditioning
from workers.context import Inputs, Params, TaskContext, TaskOutput
from workers.manifest import link_tree

_LEAST_CALLS, _TURNS = 3, 2


@dataclass(frozen=True, slots=True)
class _Bench:
    """What both models are measured with."""

    device: torch.device
    spec: SamplerSpec
    scheduler_config: Mapping[str, Any] | None
    conditioning: Path | None
    batches: tuple[int, ...]
    seconds: float


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Measure the release and the original."""
    folders = {name: context.scratch / name for name in ("artifact", "model")}
    for name, folder in folders.items():
        link_tree(context.store, inputs[name][0], folder)
    original = load_denoiser(folders["model"])
    bench = _Bench(
        device=torch.device(context.device),
        spec=SamplerSpec.from_json(params["sampler"]),
        scheduler_config=original.scheduler_config,
        conditioning=original.conditioning,
        batches=tuple(params["batches"]),
        seconds=params["seconds"],
    )
    torch.set_num_threads(context.threads)
    del original
    loaders: dict[str, Callable[[], nn.Module]] = {
        "release_figures": lambda: load_folder(folders["artifact"]),
        "original_figures": lambda: _model(load_denoiser(folders["model"])),
    }
    peaks = {name: _peak_bytes(bench, load) for name, load in loaders.items()}
    models = {name: load().to(bench.device) for name, load in loaders.items()}
    times, speeds = _step_ms(bench, models), _images_per_second(bench, models)
    sizes = {
        "release_figures": _weights_bytes(folders["artifact"]),
        "original_figures": _weights_bytes(folders["model"]),
    }
    figures = {
        name: {
            "step_ms": times[name],
            "images_per_second": speeds[name],
            "peak_memory_bytes": peaks[name],
            "bytes": sizes[name],
        }
        for name in models
    }
    where = {"device": _device_name(bench.device), "threads": torch.get_num_threads()}
    return TaskOutput({}, {**where, "backend": resolve_backend(KernelBackend.AUTO).value, **figures})


def _model(denoiser: Denoiser) -> nn.Module:
    return denoiser.model


def _call(bench: _Bench, model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """Return a call of the denoiser as the sampler makes it for a batch of seeds, in the middle of the trajectory."""
    told = trajectory_conditioning(model, bench.spec, range(batch), bench.conditioning)
    shape = sample_shape(model, token_count(told))
    timesteps = start(make_scheduler(bench.spec, bench.scheduler_config), bench.spec, shape)
    timestep = bench.spec.tell(timesteps[len(timesteps) // 2]).to(bench.device)
    rows = batch * (2 if bench.spec.is_guided else 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    conditioning = to_device(told, bench.device)

    @torch.no_grad()
    def call() -> Tensor:
        prediction = call_denoiser(model, x, timestep, conditioning)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        return prediction

    return call


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
    scheduler = make_scheduler(bench.spec, bench.scheduler_config)
    best = dict.fromkeys(models, 0.0)
    for _ in range(_TURNS):
        for name, model in models.items():
            told = trajectory_conditioning(model, bench.spec, seeds, bench.conditioning)
            started = time.perf_counter()
            sample(model, scheduler, bench.spec, seeds, told, batch_size=len(seeds))
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
        _return_free_memory()
        before = _reset_resident_peak()
    model = load().to(bench.device)
    _call(bench, model, max(bench.batches))()
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated(bench.device) - before
    return _status_bytes("VmHWM") - before


def _return_free_memory() -> None:
    """Give what the allocator holds back to the system, so that the next model's pages count as new."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_resident_peak() -> int:
    """Start the count of this process's resident peak anew, and return what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
