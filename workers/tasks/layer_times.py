"""Layer times: how long each layer of a model takes in each format, on the device at hand.

It has no outputs: what it measures is of this machine at this moment, so it is never queued or recorded. Metrics:

device: its name; threads, backend
layers: {layer: {"4/8": median milliseconds in one denoiser call at batch 1, …, "float/float": …}}, by bits of weights
    and of inputs (`float` where the release's layer leaves its input as it is)
rest_ms: what of a call no layer takes, the median over formats

Codes and scales are not the release's, which no kernel's time depends on.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.backend import resolve_backend
from quant_core.artifact.folder import parse_quantization_config, read_config
from quant_core.diffusion.conditioning import to_device
from quant_core.diffusion.denoiser import Denoiser, call_denoiser, load_denoiser, sample_shape
from quant_core.diffusion.sampler import make_scheduler, model_timestep, start, token_count, trajectory_conditioning
from quant_core.nn.model import build_quantized
from quant_core.runtime.build import build_runtime
from quant_core.runtime.loader import check_device
from quant_spec.formats import LayerSpec, ModelFormat
from quant_spec.tasks.layer_times import Inputs, Params
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import link_tree
from workers.tasks.device import device_name

_LEAST_CALLS = 5
FLOAT = "float"


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Time all layers in all formats."""
    folders = {name: context.scratch / name for name in ("artifact", "model")}
    link_tree(context.store, inputs.artifact, folders["artifact"])
    link_tree(context.store, inputs.model, folders["model"])
    device = check_device(context.device)
    backend = resolve_backend(params.backend, device)
    torch.set_num_threads(context.threads)
    formats = parse_quantization_config(read_config(folders["artifact"])["quantization_config"])
    layers: dict[str, dict[str, float]] = {name: {} for name in formats.layers}
    rests = []
    for weights, activations in [(None, None), *((w, a) for w in params.weight_bits for a in params.activation_bits)]:
        denoiser = load_denoiser(folders["model"])
        if weights is not None and activations is not None:
            chosen = {name: _with_bits(spec, weights, activations) for name, spec in formats.layers.items()}
            _fill(denoiser.model, replace(formats, layers=chosen))
            denoiser.model.to(device)
            build_runtime(denoiser.model, backend, params.backend)
        times, rest = _times(denoiser, list(formats.layers), params, device)
        rests.append(rest)
        for name, milliseconds in times.items():
            layers[name][_key(formats.layers[name], weights, activations)] = milliseconds
    where = {"device": device_name(device), "threads": torch.get_num_threads(), "backend": str(backend)}
    return TaskOutput({}, {**where, "layers": layers, "rest_ms": round(statistics.median(rests), 6)})


def _with_bits(spec: LayerSpec, weights: int, activations: int) -> LayerSpec:
    """Return a layer's format at other bits, the same for all channels and steps."""
    activation = None if spec.activation is None else replace(spec.activation, bits=activations, step_bits=())
    return replace(spec, weight=replace(spec.weight, mixture=()).with_bits(weights), activation=activation)


def _key(spec: LayerSpec, weights: int | None, activations: int | None) -> str:
    """Return the name of a format, as tables of latencies have it."""
    if weights is None:
        return f"{FLOAT}/{FLOAT}"
    return f"{weights}/{FLOAT if spec.activation is None else activations}"


def _fill(model: nn.Module, formats: ModelFormat) -> None:
    """Quantize a model with codes of zero and scales of one."""
    build_quantized(model, formats)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[2] == "scale":
            tensor.data.fill_(1)


@torch.no_grad()
def _times(
    denoiser: Denoiser, names: list[str], params: Params, device: torch.device
) -> tuple[dict[str, float], float]:
    """Return the median milliseconds of each layer in a call, and of what no layer takes."""
    model = denoiser.model.to(device)
    call = _call(denoiser, params, device)
    spent: dict[str, list[float]] = {name: [] for name in names}
    began: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: began.update({name: now()}))
        module.register_forward_hook(lambda *_, name=name: spent[name].append(1000 * (now() - began[name])))
    call()
    for times in spent.values():
        times.clear()
    totals: list[float] = []
    while len(totals) < _LEAST_CALLS or sum(totals) < 1000 * params.seconds:
        started = now()
        call()
        totals.append(1000 * (now() - started))
    # A layer may be called several times in a call, or not at all where a table replaces what reads it.
    found = {
        name: round(statistics.median(times) * len(times) / len(totals), 6) for name, times in spent.items() if times
    }
    return found, max(statistics.median(totals) - sum(found.values()), 0.0)


def _call(denoiser: Denoiser, params: Params, device: torch.device) -> Any:
    """Return a call of the denoiser as the sampler makes it for one seed, in the middle of the trajectory."""
    model, sampler = denoiser.model, params.sampler
    conditioning = trajectory_conditioning(model, sampler, range(1), denoiser.conditioning)
    shape = sample_shape(model, token_count(conditioning))
    timesteps = start(make_scheduler(sampler, denoiser.scheduler_config), sampler, shape)
    timestep = model_timestep(timesteps[len(timesteps) // 2], sampler).to(device)
    x = torch.randn(2 if sampler.is_guided else 1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    conditioning = to_device(conditioning, device)

    def call() -> Tensor:
        return call_denoiser(model, x, timestep, conditioning)

    return call
