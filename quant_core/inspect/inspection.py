"""What the planner needs to know of a model, as JSON: units, layers, multiplications, bytes; nothing of its weights'
values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from quant_core.diffusion.conditioning import conditioning_fields, is_shared
from quant_core.diffusion.denoiser import Denoiser, has_tokens
from quant_core.diffusion.streamed import is_streamed
from quant_core.errors import DenoiserError
from quant_core.inspect.first_call import Call, check_prediction_shape, describe_needs, explained
from quant_core.inspect.pipeline import describe_pipeline
from quant_core.inspect.temporal import trace_temporal
from quant_core.inspect.trace import Trace, trace_denoiser
from quant_core.inspect.units import Unit, find_units
from quant_core.nn.layers import QUANTIZABLE
from quant_spec.enums import SampleSpace
from quant_spec.errors import QuantServiceError
from quant_spec.pipeline import sample_space

GIGA = 1e9
_FLOAT_BYTES = 4


def trace_model(denoiser: Denoiser, call: Call | None = None) -> Trace:
    """Trace one forward at batch 1, with the folder's first drawn conditioning or zeros where there is none.

    Parameters
    ----------
    call : Call, optional
        What a pipeline calls it with, instead.

    Raises
    ------
    DenoiserError, ConditioningError
        If the model cannot be called so, or predicts something else than it takes; see `quant_core.inspect.first_call`.
    """
    x, timestep, conditioning = call or Call.of(denoiser)
    with explained(denoiser, x, conditioning):
        trace = trace_denoiser(denoiser.model, x, timestep, conditioning)
    if call is None:
        check_prediction_shape(denoiser.model, x, trace.output_shape)
    return trace


def inspect_model(denoiser: Denoiser) -> dict[str, Any]:
    """Describe a denoiser for planning; a whole pipeline is called.

    Returns
    -------
    dict
        JSON. Per unit in execution order: its layers, attentions, giga-MACs (attention matmuls included), weights,
        float32 bytes of its inputs and outputs per sample, bytes of its layers' Hessians (float32, per convolution
        group), and `depth`, the share of the forward's MACs done when it has first finished. Per layer: type, weight
        shape, MACs, split of its input. Per attention: MACs of its two matmuls. All at batch 1. `temporal`: the layers
        of the temporal information block, see `quant_core.inspect.temporal.TemporalLayer`. `scheduler`: the model's own
        scheduler config, null if it has none; numbers that are not finite as text. `samples`: "pixels" or "latents".
        `sample_shape` and `input_shape`: of what it predicts and of what it is given, which are the same unless its
        input is a concatenation.
        `has_tokens`: whether samples are packed tokens. `conditioning`: what a forward is told, with the number of
        classes or the shape of a row; with it the entries of `quant_core.inspect.first_call.describe_needs`.
        `streamed`: true where weights are so large that tasks leave them in their files. `pipeline`: what
        `quant_core.inspect.pipeline.describe_pipeline` says of a whole pipeline, null for a denoiser.

    Raises
    ------
    DenoiserError, ConditioningError
        As `trace_model`.
    """
    model = denoiser.model
    pipeline, call = describe_pipeline(denoiser) if denoiser.is_whole else (None, None)
    try:
        trace = trace_model(denoiser, call)
    except QuantServiceError as error:
        if pipeline is None or pipeline["problem"] is None:
            raise
        raise DenoiserError(f"{pipeline['class_name']}: {pipeline['problem']}; its denoiser alone: {error}") from error
    found = find_units(model, trace)
    done = _finished(trace)
    units = [_describe_unit(model, unit, trace, done) for unit in found.units]
    return {
        "class_name": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "sample_shape": list(trace.output_shape[1:]),
        "input_shape": list((call or Call.of(denoiser)).x.shape[1:]),
        "forward_gmacs": trace.macs / GIGA,
        "activation_bytes": sum(layer.input_bytes for layer in trace.layers.values()),
        "has_tokens": has_tokens(model),
        "conditioning": _describe_conditioning(denoiser),
        **describe_needs(denoiser),
        "units": units,
        **_describe_layers(model, trace, found.units),
        "unused": list(found.unused),
        "temporal": _describe_temporal(denoiser, call),
        "pipeline": pipeline,
        "scheduler": _finite(denoiser.scheduler_config),
        "samples": _samples(trace.output_shape[1:], denoiser, pipeline),
        **({"streamed": True} if is_streamed(model) else {}),
    }


def describe_layers(denoiser: Denoiser, call: Call | None = None) -> dict[str, Any]:
    """Return `layers` and `attentions` of `inspect_model`, and nothing else: what a forward costs.

    Parameters
    ----------
    call : Call, optional
        As for `trace_model`.
    """
    trace = trace_model(denoiser, call)
    return _describe_layers(denoiser.model, trace, find_units(denoiser.model, trace).units)


def _describe_layers(model: nn.Module, trace: Trace, units: Sequence[Unit]) -> dict[str, Any]:
    return {
        "layers": {name: _describe_layer(model, name, trace) for unit in units for name in unit.layers},
        "attentions": {name: {"macs": macs} for name, macs in trace.attentions.items()},
    }


def _finite(value: Any) -> Any:
    """Return JSON with numbers that JSON has none of (-inf of a schedule's log-SNR) as text."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _finished(trace: Trace) -> dict[str, float]:
    """Return, for each layer and attention, the share of the forward's MACs done after its first call."""
    done, total = 0, max(trace.macs, 1)
    shares: dict[str, float] = {}
    for event in trace.events:
        done += event.macs
        shares.setdefault(event.name, done / total)
    return shares


def _describe_unit(model: nn.Module, unit: Unit, trace: Trace, done: dict[str, float]) -> dict[str, Any]:
    parts = (*unit.layers, *unit.attentions)
    macs = sum(trace.layers[name].macs for name in unit.layers) + sum(
        trace.attentions[name] for name in unit.attentions
    )
    bytes_in, bytes_out = trace.spans[unit.name]
    weights = [model.get_submodule(name).get_parameter("weight") for name in unit.layers]
    return {
        "name": unit.name,
        "layers": list(unit.layers),
        "attention": list(unit.attentions),
        "gmacs": macs / GIGA,
        "weights": sum(weight.numel() for weight in weights),
        "input_bytes": bytes_in,
        "output_bytes": bytes_out,
        "hessian_bytes": sum(_hessian_bytes(model.get_submodule(name)) for name in unit.layers),
        "depth": round(max(done[name] for name in parts), 6),
    }


def _hessian_bytes(layer: nn.Module) -> int:
    """Return the float32 bytes of the Gram matrix of a layer's inputs, one per convolution group."""
    columns = math.prod(layer.get_parameter("weight").shape[1:])
    return _FLOAT_BYTES * columns**2 * int(getattr(layer, "groups", 1))


def _describe_layer(model: nn.Module, name: str, trace: Trace) -> dict[str, Any]:
    layer, traced = model.get_submodule(name), trace.layers[name]
    kind = next(kind for kind in QUANTIZABLE if isinstance(layer, kind))
    return {
        "type": kind.__name__,
        "shape": list(layer.get_parameter("weight").shape),
        "macs": traced.macs,
        "split": None if traced.split is None else list(traced.split),
    }


def _samples(shape: tuple[int, ...], denoiser: Denoiser, pipeline: Mapping[str, Any] | None) -> str:
    """Return what the samples are that are compared: what a pipeline makes of a denoiser's, if it can be called."""
    if pipeline is not None and pipeline["problem"] is None:
        return str(SampleSpace.PIXELS)
    return str(sample_space(shape, denoiser.pipeline))


def _describe_temporal(denoiser: Denoiser, call: Call | None) -> dict[str, Any]:
    x, timestep, conditioning = call or Call.of(denoiser)
    with explained(denoiser, x, conditioning):
        found = trace_temporal(denoiser.model, x, timestep.reshape(1).float(), conditioning)
    return {name: layer.to_json() for name, layer in found.layers.items()}


def _describe_conditioning(denoiser: Denoiser) -> dict[str, Any]:
    """Return the conditioning that the model needs: the number of classes of a label, or the shape of a row."""
    fields = conditioning_fields(denoiser.model)
    return {
        key: field.classes if field.classes is not None else list(field.shape)
        for key, field in fields.items()
        if not is_shared(key)
    }
