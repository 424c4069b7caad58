"""TFMQ-DM: quantize the layers that compute temporal features so that the features stay what they were.

Huang et al., "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models", arXiv:2311.16503, and its
extension "Temporal Feature Matters", arXiv:2407.19547: the temporal information block (Sec. 4.1 of the former),
temporal information aware reconstruction (Eq. 7), finite set calibration (Sec. 4.3), cached temporal features with
disturbance-aware selection (the latter). The rest of the network is left to other passes.

Where we differ from the authors' code (TFMQ-DM@d551eac), and why:

- The block is found by following values (`quant_core.inspect.temporal`), for any denoiser, class labels included.
- Reconstruction runs over the sampler's whole finite set, every timestep with every class, as one full batch; the
  authors draw batches of 32 from timesteps that are repeated for each calibration image.
- It starts from closed-form codes (GPTQ over the finite set) and biases that take up each channel's mean error, and
  ends with such biases. A result that is not better than its start is not taken. 20,000 iterations become hundreds.
- The first Linear of the time MLP is in the block; the authors leave it in full precision.
- A table is stored at 16 or 8 bits, by its size against the weights that it replaces; a layer whose outputs only
  replaced layers read is dropped. Where features depend on a continuous condition (a text's pooled embedding), what
  depends on the timestep alone is cached: the time MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.adaround import learn_rounding
from quant_core.fit.hessian import InputMoments, SecondMoment
from quant_core.fit.layer_rounding import round_layer
from quant_core.fit.observe import StepRanges
from quant_core.fit.rounding import UnitRanges
from quant_core.fit.unit_state import UnitState, collect_state, merge_formats
from quant_core.methods.tfmq.feature_tables import Tables, byte_count, choose_tables, table_entries
from quant_core.methods.tfmq.finite_set import FeatureError, FiniteSet, enumerate_set, feature_error
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.feature_table import decode_features
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_spec.enums import ActivationMode, RangeMethod, TemporalRounding
from quant_spec.formats import UnitFormat
from quant_spec.passes.temporal import TemporalFit


@dataclass(frozen=True, slots=True)
class TemporalReport:
    """What became of the block: rows of its finite set, and of each feature how near it stayed to full precision.

    `features`: by layer, what serves it, and its cosine similarity and signal-to-noise ratio in dB when its weights
    were rounded (`…_start`), in the end, and from its table (`…_table`).
    """

    rows: int
    features: dict[str, dict[str, Any]]
    table_bytes: int = 0
    replaced_bytes: int = 0
    unserved: list[str] = field(default_factory=list)


def fit(
    model: nn.Module, calibration: CalibrationSet, formats: UnitFormat, ranges: UnitRanges, config: TemporalFit
) -> tuple[UnitState, TemporalReport]:
    """Quantize the temporal information block.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; its layers are replaced in place.
    formats, ranges : UnitFormat, UnitRanges
        Of the block's layers that are to be quantized.

    Returns
    -------
    UnitState, TemporalReport
        The state holds codes, activation tables and tables of features, and names the layers that are dropped.
    """
    model.requires_grad_(False)
    finite = enumerate_set(model, calibration)
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in formats.layers}
    timesteps = tuple(float(t) for t in calibration.timesteps)
    state = UnitState(formats, timesteps, {})
    parts = build_quantized(model, merge_formats([state]))
    is_nearest = config.method is TemporalRounding.NEAREST
    for name, layer in parts.layers.items():
        _set_ranges(layer, finite.inputs[name], finite, ranges.activations.get(name))
        moments = None if is_nearest else InputMoments(_second_moment(finite.inputs[name]))
        round_layer(layer, weights[name], moments, ranges.weights[name], config.damping)
    start = _errors(finite, model, parts)
    if not is_nearest:
        correct_biases(finite, model, parts)
    if config.method is TemporalRounding.RECONSTRUCT:
        reconstruct(finite, model, parts, weights, config)
    end = _errors(finite, model, parts)
    tables = choose_tables(finite, parts, end, config.cache_ratio) if config.cache else Tables({}, {}, ())
    return _result(finite, parts, formats, timesteps, tables), _report(finite, parts, start, end, tables)


def _result(
    finite: FiniteSet, parts: QuantizedParts, formats: UnitFormat, timesteps: tuple[float, ...], tables: Tables
) -> UnitState:
    """Return the state of the block: the layers that still run, and the tables."""
    gone = {*tables.specs, *tables.unserved}
    layers = {name: spec for name, spec in formats.layers.items() if name not in gone}
    per_step = any(spec.activation and spec.activation.mode is ActivationMode.PER_STEP for spec in layers.values())
    kept = UnitFormat(formats.unit, layers, {})
    state = collect_state(parts, kept, timesteps if per_step or tables.specs else ())
    held = {f"{name}.{key}": tensor for name, table in tables.tensors.items() for key, tensor in table.items()}
    return UnitState(
        UnitFormat(formats.unit, layers, {}, tables.specs, tables.unserved), state.timesteps, {**state.tensors, **held}
    )


def _report(
    finite: FiniteSet,
    parts: QuantizedParts,
    start: Mapping[str, FeatureError],
    end: Mapping[str, FeatureError],
    tables: Tables,
) -> TemporalReport:
    features = {}
    for name in {*finite.features(), *tables.specs}:
        features[name] = {
            "served": f"table, {tables.specs[name].bits} bits" if name in tables.specs else "layer",
            "cosine_start": round(start[name].cosine, 6),
            "cosine": round(end[name].cosine, 6),
            "sqnr_db_start": round(start[name].sqnr_db, 4),
            "sqnr_db": round(end[name].sqnr_db, 4),
        }
        if name in tables.specs:
            stored = table_entries(decode_features(tables.tensors[name]), finite)
            error = feature_error(stored, finite.outputs[name])
            features[name] |= {"cosine_table": round(error.cosine, 6), "sqnr_db_table": round(error.sqnr_db, 4)}
    gone = [name for name in parts.layers if name in tables.specs or name in tables.unserved]
    return TemporalReport(
        finite.steps * finite.variants,
        dict(sorted(features.items(), key=lambda item: list(finite.layers).index(item[0]))),
        sum(byte_count(table.values()) for table in tables.tensors.values()),
        sum(byte_count(parts.layers[name].state_dict().values()) for name in gone),
        list(tables.unserved),
    )


def _second_moment(x: Tensor) -> Tensor:
    """Return E[x x^T] of a layer's inputs over the finite set, shape (C_in, C_in)."""
    moment = SecondMoment(x.shape[1], x.device)
    moment.update(x)
    return moment.mean()


def _set_ranges(layer: QuantLayer, x: Tensor, finite: FiniteSet, ranges: Any) -> None:
    """Fill a layer's activation tables from its inputs over the finite set (Sec. 4.3: one range per timestep)."""
    spec = layer.spec.activation
    if spec is None or spec.is_dynamic:
        return
    seen = StepRanges(finite.steps, ranges.method is not RangeMethod.MINMAX)
    generator = torch.Generator().manual_seed(0)
    for step, rows in enumerate(x.split(finite.variants)):
        seen.update(step, rows, rows.numel(), generator)
    for quantizer in layer.act_quantizers:
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.set_qparams(seen.qparams(spec, ranges))


@torch.no_grad()
def correct_biases(finite: FiniteSet, model: nn.Module, parts: QuantizedParts) -> None:
    """Move each layer's bias so that the mean error of every output channel over the finite set is zero."""
    for name in finite.layers:
        layer = parts.layers.get(name)
        if layer is not None and layer.bias is not None:
            error = finite.run(model, parts)[name] - finite.outputs[name]
            layer.bias -= error.mean(dim=0)


def reconstruct(
    finite: FiniteSet,
    model: nn.Module,
    parts: QuantizedParts,
    weights: Mapping[str, Tensor],
    config: TemporalFit,
) -> None:
    """Learn the rounding of all layers of the block for the error of its features alone (Eq. 7), in full batches."""
    targets = {name: finite.outputs[name] for name in finite.features()}
    before = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in parts.layers.items()}
    with torch.no_grad():
        start = _feature_loss(finite.run(model, parts), targets).item()
    learn_rounding(
        parts.layers, weights, lambda: _feature_loss(finite.run(model, parts), targets), max(start, 1e-20), config
    )
    correct_biases(finite, model, parts)
    with torch.no_grad():
        after = _feature_loss(finite.run(model, parts), targets).item()
    if not after < start:
        for name, layer in parts.layers.items():
            layer.load_state_dict(before[name])


def _feature_loss(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Return sum_i |g_i - g_hat_i|^2, summed over channels and averaged over rows (Eq. 7)."""
    return torch.stack([(outputs[name] - target).square().sum(dim=1).mean() for name, target in targets.items()]).sum()


@torch.no_grad()
def _errors(finite: FiniteSet, model: nn.Module, parts: QuantizedParts) -> dict[str, FeatureError]:
    outputs = finite.run(model, parts)
    return {name: feature_error(outputs[name], finite.outputs[name]) for name in finite.layers}
