"""A release on an integer backend against the reference backend, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quant_core
from kernels.cpu_weight import sums_pairs_exactly
from quant_core.nn.layers import QuantLayer
from quant_core.runtime.layer import RuntimeLayer
from quant_spec.enums import KernelBackend


def check_release(folder: Path, backend: str, predict: Callable[[nn.Module], Tensor]) -> dict[str, str]:
    """Give each layer the input that it has on the reference backend; return which backend runs it.

    Layer by layer, since rounding differences that move a value across the middle of two codes grow in those behind.
    """
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, args, out: calls.setdefault(name, (args[0].clone(), out.clone())) and None

    reference = quant_core.load_quantized(folder, backend="reference")
    for name, module in reference.named_modules():
        if isinstance(module, QuantLayer):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        want = predict(reference)
        if backend == "cpu" and not sums_pairs_exactly():
            return {}
        model = quant_core.load_quantized(folder, backend=backend)
        got = predict(model)  # leaves its clock at the step of the calls
        assert float((got - want).norm() / want.norm()) < 0.1
        layers = {module.run.layer: module for module in model.modules() if isinstance(module, RuntimeLayer)}
        for layer in layers.values():
            layer.norm = layer.calls = None  # what it takes from the block in front of it has tests of its own
        for name, (x, out) in calls.items():
            off = (layers[name] if name in layers else model.get_submodule(name))(x).float() - out.float()
            assert float(off.abs().max()) <= 2.0**-15 * float(out.abs().max()), name
    if not sums_pairs_exactly():
        return {}
    assert {run.backend for run in quant_core.layer_runs(model)} <= {KernelBackend.CPU, KernelBackend.REFERENCE}
    return {run.layer: str(run.backend) for run in quant_core.layer_runs(model)}
