"""The packed runtime: quantized layers replaced by ones that multiply integers on the device at hand.

A `RuntimeLayer` computes what its `QuantLayer` simulates: the same codes, the same integer sums, scaled in float32. So
it differs from the reference by float rounding only; what a backend can't run so stays a `QuantLayer`. See
docs/adr/0006-runtime.md.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import nn

from kernels.backend import BackendUnavailableError, prefers_int8_weights, why_reference
from kernels.cpu_measure import process_timings
from kernels.errors import KernelError
from kernels.fp8 import why_no_fp8
from kernels.fp8_measure import process_fp8_timings
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.askable import keep_askable
from quant_core.nn.layers import QuantLayer, replace_module
from quant_core.nn.model import PACKED_MODULES
from quant_core.nn.steps import StepClock
from quant_core.runtime.fused_blocks import fuse_blocks
from quant_core.runtime.fused_transformer import fuse_transformers
from quant_core.runtime.joint_attention import fuse_attentions
from quant_core.runtime.layer import LayerRun, RuntimeLayer, layer_quantizers
from quant_core.runtime.memory import return_free_memory
from quant_core.runtime.parts import is_pointwise
from quant_core.runtime.shared_input import share_inputs
from quant_core.runtime.vector_layers import vector_layers
from quant_spec.enums import ActivationMode, KernelBackend, WeightMemory
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec

# What this module knows of a layer's format. A layer with any other field set runs the reference.
_KNOWN_FIELDS = {
    LayerSpec: {"weight", "activation", "split", "channel_scale", "channel_shift", "low_rank"},
    WeightSpec: {"bits", "symmetric", "granularity", "group_size", "mixture", "type", "group_scale"},
    ActivationSpec: {"bits", "symmetric", "mode", "step_bits", "type", "differences"},
}
# Packed bytes that are laid out before the allocator's free pages go back to the system: what a layer needs meanwhile
# is a few times its size, in pieces of all sizes.
TRIM_BYTES = 8 << 20


def build_runtime(
    model: nn.Module,
    backend: KernelBackend,
    asked: KernelBackend | str = KernelBackend.REFERENCE,
    memory: WeightMemory | str = WeightMemory.AUTO,
) -> list[LayerRun]:
    """Replace the quantized layers of `model`, in place and one by one, by runtime layers where `backend` has them.

    Parameters
    ----------
    model : Module
        Loaded, on the device where it will run; its parameters are frozen.
    backend : KernelBackend
        `AUTO` must have been resolved.
    asked : KernelBackend or str
        What it was resolved from, for the reason of layers that run the reference; of "auto", a CPU's products are
        timed (`kernels.cpu_measure`), and a GPU's of FP8 (`kernels.fp8_measure`).
    memory : WeightMemory or str
        How weights lie in a GPU's memory ("auto" leaves layers packed that read one vector of a sample); and whether a
        CPU may unpack to floats those that it can't multiply as integers (not if "packed").

    Returns
    -------
    list of LayerRun
        One for each quantized layer, in the model's order; `layer_runs` gives them again.
    """
    model.requires_grad_(False)
    tensors = [*model.parameters(), *model.buffers()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    unpacked, floats = unpacks(memory, device), backend is KernelBackend.CPU and memory != WeightMemory.PACKED
    few_rows: frozenset[str] = frozenset() if memory == WeightMemory.FAST else vector_layers(model)
    layers: list[LayerRun | RuntimeLayer] = []
    laid_out = 0
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]:
        if backend is KernelBackend.REFERENCE:
            layers.append(LayerRun(name, KernelBackend.REFERENCE, why_reference(asked, device)))
            continue
        made = _runtime_layer(layer, name, backend, unpacked=unpacked and name not in few_rows, floats=floats)
        if asked == KernelBackend.AUTO and isinstance(made, RuntimeLayer):
            made = _timed(made, layer, dtype, floats=floats)
        layers.append(made)
        if isinstance(made, RuntimeLayer):
            replace_module(model, name, made)
            laid_out += layer.qweight.numel()
            if device.type == "cpu" and laid_out > TRIM_BYTES:
                laid_out = 0
                return_free_memory()
    fuse_blocks(model)
    if backend is KernelBackend.TRITON:
        fuse_attentions(model)
        fuse_transformers(model)
    share_inputs(model)
    if not any(tensor.is_floating_point() for tensor in (*model.parameters(), *model.buffers())):
        # Runtime layers took all tensors, from which diffusers takes a model's dtype and device.
        model.register_buffer("quantmill_anchor", torch.empty(0, dtype=dtype, device=device), persistent=False)
    keep_askable(model, (*PACKED_MODULES, RuntimeLayer))
    runs = [layer.run if isinstance(layer, RuntimeLayer) else layer for layer in layers]
    if device.type != "cpu":
        run_on(model, device)
    model.quantmill_runs = tuple(runs)  # type: ignore[assignment]
    return runs


def _runtime_layer(
    layer: QuantLayer, name: str, backend: KernelBackend, *, unpacked: bool, floats: bool
) -> RuntimeLayer | LayerRun:
    """Return what `backend` runs a layer as, or why it runs the reference."""
    reason = _unsuited(layer, backend)
    if reason is None:
        try:
            return RuntimeLayer(layer, name, backend, unpacked=unpacked)
        except (KernelError, BackendUnavailableError) as error:
            reason = str(error)
    if floats and _multiplies_as_floats(layer):
        try:
            return RuntimeLayer(layer, name, backend, why_floats=reason)
        except KernelError as error:
            reason = str(error)
    return LayerRun(name, KernelBackend.REFERENCE, reason)


def _timed(made: RuntimeLayer, layer: QuantLayer, dtype: torch.dtype, *, floats: bool) -> RuntimeLayer:
    """Let what was timed choose between a layer's products; where integers are too slow on a CPU, multiply floats."""
    if made.run.backend is not KernelBackend.CPU:
        made.measure_fp8(process_fp8_timings(), dtype)
        return made
    slow = made.measure(process_timings())
    if slow and floats and _multiplies_as_floats(layer):
        return RuntimeLayer(layer, made.run.layer, KernelBackend.CPU, why_floats=slow)
    return made


def _multiplies_as_floats(layer: QuantLayer) -> bool:
    """Whether a CPU's float operators multiply what a layer's codes stand for: not differences, nor E4M3 numbers."""
    activation = layer.spec.activation
    if _unsuited_form(layer) is not None or layer.differences:
        return False
    return not layer.spec.weight.is_float and (activation is None or not activation.is_float)


def unpacks(memory: WeightMemory | str, device: torch.device) -> bool:
    """Whether weights are unpacked on a device.

    Raises
    ------
    QuantizationError
        If `memory` is not one of the names of `WeightMemory`.
    """
    try:
        choice = WeightMemory(memory)
    except ValueError:
        raise QuantizationError(f"memory: got {str(memory)!r}, wanted one of {', '.join(WeightMemory)}") from None
    return choice is WeightMemory.FAST or (choice is WeightMemory.AUTO and prefers_int8_weights(device))


def run_on(model: nn.Module, device: torch.device) -> None:
    """Move to the device what is derived from formats and in no state dict; a forward then never waits for the host."""
    for module in model.modules():
        if isinstance(clock := getattr(module, "clock", None), StepClock):
            clock.run_on(device)
        if isinstance(module, ActivationQuantizer):
            module.tops = module.tops.to(device)
        if isinstance(module, QuantLayer):
            module.group_index = module.group_index.to(device)


def layer_runs(model: nn.Module) -> tuple[LayerRun, ...]:
    """Return how each quantized layer of a model runs; a model that plain diffusers loaded runs the reference."""
    known = getattr(model, "quantmill_runs", None)
    if known is not None:
        return tuple(known)
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLayer)]
    return tuple(LayerRun(name, KernelBackend.REFERENCE, "no runtime was built") for name in names)


def _unsuited(layer: QuantLayer, backend: KernelBackend) -> str | None:
    """Say why `backend` can't run a layer exactly; None if nothing is known against it."""
    spec, activation = layer.spec, layer.spec.activation
    if spec.weight.is_float or (activation is not None and activation.is_float):
        return _unsuited_form(layer) or _unsuited_float(layer, backend)
    reason = _unsuited_form(layer)
    if reason is not None:
        return reason
    if layer.kind is nn.Conv2d:
        return None if activation is not None else "its input is not quantized, and convolutions multiply integers"
    if backend is KernelBackend.CPU:
        if activation is None:
            return "its input is not quantized, and oneDNN multiplies integers"
        if activation.mode is ActivationMode.DYNAMIC_TOKEN:
            return "ranges per token: oneDNN takes one for each call"
    return None


def _unsuited_form(layer: QuantLayer) -> str | None:
    """Say why no kernel runs a layer of this kind, form or format; None if nothing is known against it."""
    spec, activation = layer.spec, layer.spec.activation
    for record in (spec, spec.weight, *(() if activation is None else (activation,))):
        unknown = [field.name for field in fields(record) if _is_unknown(record, field.name)]
        if unknown:
            return f"formats with {', '.join(unknown)} have no kernel"
    if layer.soft_weight is not None or any(q.soft_scale is not None or not q.enabled for q in layer_quantizers(layer)):
        return "its rounding or ranges are being learned"
    if layer.kind not in (nn.Linear, nn.Conv2d):
        return f"{layer.kind.__name__} has no kernel"
    is_plain = layer.kind is nn.Linear or (layer.groups == 1 and layer.padding_mode == "zeros")
    if not is_plain or (layer.kind is nn.Conv2d and isinstance(layer.padding, str)):
        return f"got a convolution of {layer.groups} groups, padding {layer.padding!r} {layer.padding_mode}"
    return None


def _unsuited_float(layer: QuantLayer, backend: KernelBackend) -> str | None:
    """Say why `backend` can't run a layer with E4M3 numbers; None if nothing is known against it."""
    if backend is not KernelBackend.TRITON:
        return "FP8 numbers: oneDNN multiplies integers"
    activation = layer.spec.activation
    if activation is None or not activation.is_float or not layer.spec.weight.is_float:
        return "FP8 kernels multiply E4M3 inputs with E4M3 weights"
    if layer.kind is nn.Conv2d and not is_pointwise(layer):
        return "FP8 convolutions have no kernel, but those of 1 x 1 pixels"
    return why_no_fp8(layer.qweight.device)


def _is_unknown(record: LayerSpec | WeightSpec | ActivationSpec, name: str) -> bool:
    """Whether a record sets a field that this module does not know."""
    known = next(names for kind, names in _KNOWN_FIELDS.items() if isinstance(record, kind))
    return name not in known and bool(getattr(record, name))
