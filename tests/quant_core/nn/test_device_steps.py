"""A step on a GPU: nothing waits for the host, all is on the device, and a CUDA graph of it follows the timestep.

Without a GPU, the meta device stands for one: its tensors have no values, so reading one raises, and so does mixing
them with tensors on the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_core.runtime.build import build_runtime, run_on
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import ActivationMode, KernelBackend
from quant_spec.formats import ModelFormat
from tests.quant_core.runtime.test_build import LAYERS, noise
from tests.quant_core.runtime.test_parts import FORMATS, made

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]
DEVICE = torch.device("meta")


def on_device(value: Any) -> Any:
    """Replace every tensor in records and tuples by one on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple):
        return type(value)(on_device(each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: on_device(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def move(model: nn.Module) -> None:
    """Put a model, whose runtime was built on the CPU for Triton, on the device."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: on_device(tensor) for name, tensor in store.items()})
        if isinstance(module, RuntimeLayer):
            module.parts, module.bias, module.norm = map(on_device, (module.parts, module.bias, module.norm))
    run_on(model, DEVICE)


@pytest.mark.parametrize("family", ["unet", "sdxl_unet", "dit"])
@pytest.mark.parametrize("mode", [ActivationMode.PER_STEP, ActivationMode.DYNAMIC_TOKEN])
def test_models_run_on_a_device_without_the_host(
    tiny_model: Make, quantize_model: Quantize, family: str, mode: ActivationMode
) -> None:
    model = tiny_model(family)
    quantize_model(model, mode)
    build_runtime(model, KernelBackend.TRITON)
    shape = (2, model.config.in_channels, 8, 8)
    with torch.no_grad():
        move(model)

        def gpu(*size: int) -> Tensor:
            return torch.empty(size, device=DEVICE)

        if family == "sdxl_unet":
            added = {"text_embeds": gpu(2, 10), "time_ids": gpu(2, 6)}
            conditioning: dict[str, Any] = {"encoder_hidden_states": gpu(2, 5, 12), "added_cond_kwargs": added}
        else:
            conditioning = {"class_labels": torch.empty(2, dtype=torch.long, device=DEVICE)}
        for timestep in (gpu(2),) if family == "dit" else (gpu(), gpu(2)):
            out = model(gpu(*shape), timestep, **conditioning).sample
            assert out.shape[2:] == shape[2:]
            assert out.device == DEVICE


@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3"])
@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_layers_of_all_formats_do(name: str, spec: Any) -> None:
    make, shape = LAYERS[name]
    model, clock = made(make(), spec)
    with torch.no_grad():
        want = model(noise(*shape)).shape
        build_runtime(model, KernelBackend.TRITON)
        move(model)
        clock.set_timestep(torch.empty(2, device=DEVICE))
        assert model(torch.empty(shape, device=DEVICE)).shape == want


@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3"])
def test_so_does_what_is_left_to_the_reference(name: str) -> None:
    make, shape = LAYERS[name]
    model, clock = made(make(), FORMATS["mixed, both, split, bits by step"])
    move(model)
    with torch.no_grad():
        clock.set_timestep(torch.empty(2, device=DEVICE))
        assert model(torch.empty(shape, device=DEVICE)).device == DEVICE


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_a_captured_step_follows_the_timestep(tiny_model: Make, quantize_model: Quantize, compiles: bool) -> None:
    model = tiny_model("unet")
    quantize_model(model)
    model = model.cuda()
    build_runtime(model, KernelBackend.TRITON)
    run = torch.compile(model, fullgraph=True) if compiles else model
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()
    labels, timestep = torch.tensor([0, 3], device="cuda"), torch.tensor(900.0, device="cuda")

    def step() -> Tensor:
        return run(x, timestep, class_labels=labels).sample

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        results = []
        for t in (900.0, 100.0):
            timestep.fill_(t)
            graph.replay()
            results.append(out.clone())
            assert torch.allclose(results[-1], step(), atol=1e-4 * float(out.abs().max()))
    assert not torch.allclose(results[0], results[1], rtol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["linear 3-D", "conv 3x3"])
@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_captured_layers_of_all_formats_follow_the_timestep(name: str, spec: Any) -> None:
    make, shape = LAYERS[name]
    model, clock = made(make(), spec)
    reference, slow = made(make(), spec)
    reference.load_state_dict(model.state_dict())
    model = model.cuda()
    build_runtime(model, KernelBackend.TRITON)
    x, timestep = noise(*shape), torch.tensor([900.0, 100.0])
    on_device, timestep_on_device = x.cuda(), timestep.cuda()

    def step() -> Tensor:
        clock.set_timestep(timestep_on_device)
        return model(on_device)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for steps in ([900.0, 100.0], [500.0, 900.0]):
            timestep_on_device.copy_(torch.tensor(steps))
            graph.replay()
            slow.set_timestep(torch.tensor(steps))
            want = reference(x)
            assert float((out.cpu() - want).abs().max()) < 2.0**-15 * float(want.abs().max())
