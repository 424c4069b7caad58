"""TFMQ-DM: temporal features of a quantized denoiser kept what they were.

Huang et al., "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models", arXiv:2311.16503, and its
extension "Temporal Feature Matters", arXiv:2407.19547: the temporal information block (Sec. 4.1 of the former),
temporal information aware reconstruction (Eq. 7), finite set calibration (Sec. 4.3), cached temporal features with
disturbance-aware selection (the latter). The rest of the network is the other passes' business.

Where we differ from the authors' code (TFMQ-DM@d551eac), and why:

- The block is found by following values (`quant_core.inspect.temporal`), for any denoiser, class labels included.
- Reconstruction runs over the sampler's whole finite set, every timestep with every class, as one full batch; the
  authors draw batches of 32 from timesteps that are repeated for each calibration image.
- It starts from closed-form codes (GPTQ over the finite set) and biases that take up each channel's mean error, and
  ends with such biases. A result that is not better than its start is not taken. 20,000 iterations become hundreds.
- The first Linear of the time MLP is in the block; the authors leave it in full precision.
- A table is stored at 16 or 8 bits, by its size against the weights that it replaces; layers that only tables would
  need are not stored at all. Where features depend on a continuous condition (a text's pooled embedding), what depends
  on the timestep alone is cached: the time MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.fit.adaround import SoftRounding, anneal
from quant_core.fit.hessian import SecondMoment
from quant_core.fit.observe import StepRanges
from quant_core.fit.rounding import RoundingConfig, UnitRanges, round_layer
from quant_core.fit.unit_state import UnitFormats, UnitState, collect_state, merge_plans
from quant_core.inspect.temporal import LABEL
from quant_core.methods.tfmq.finite_set import FeatureError, FiniteSet, enumerate_set, feature_error
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.feature_table import decode_features, encode_features
from quant_core.nn.layers import QuantLayer
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_spec.enums import ActivationMode, RangeMethod, RoundingMethod, TemporalRounding
from quant_spec.formats import FeatureSpec


@dataclass(frozen=True, slots=True)
class TemporalConfig:
    """How the block is quantized.

    `rounding`: the last of closed form and reconstruction that is made. `damping`: see `round_closed_form`; small, as
    the finite set is all that the block will ever see. `iterations`, `lr` of Adam; `trust`: see `SoftRounding`;
    `rounding_weight`, `warmup`, `beta`: the regulariser, as in `quant_core.fit.reconstruction`. `cache`: whether
    features are kept in tables, which may take `cache_ratio` times the bytes of the weights that they replace.
    """

    rounding: TemporalRounding = TemporalRounding.RECONSTRUCT
    damping: float = 0.001
    iterations: int = 300
    lr: float = 2e-2
    trust: float = 0.9
    rounding_weight: float = 100.0
    warmup: float = 0.0
    beta: tuple[float, float] = (4.0, 2.0)
    cache: bool = False
    cache_ratio: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounding", TemporalRounding(self.rounding))


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
    model: nn.Module, calibration: CalibrationSet, formats: UnitFormats, ranges: UnitRanges, config: TemporalConfig
) -> tuple[UnitState, TemporalReport]:
    """Quantize the temporal information block.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; its layers are replaced in place.
    formats, ranges : UnitFormats, UnitRanges
        Of the block's layers that are to be quantized.

    Returns
    -------
    UnitState, TemporalReport
        The state holds codes, activation tables, tables of features, and names the layers that nothing needs.
    """
    model.requires_grad_(False)
    finite = enumerate_set(model, calibration)
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in formats.layers}
    timesteps = tuple(float(t) for t in calibration.timesteps)
    state = UnitState(formats, timesteps, {})
    parts = build_quantized(model, merge_plans([state]))
    for name, layer in parts.layers.items():
        _set_ranges(layer, finite.inputs[name], finite, ranges.activations.get(name))
        rounding = RoundingConfig(
            RoundingMethod.NEAREST if config.rounding is TemporalRounding.NEAREST else RoundingMethod.CLOSED_FORM,
            damping=config.damping,
        )
        moment = SecondMoment(weights[name].shape[1], weights[name].device)
        moment.update(finite.inputs[name])
        round_layer(
            layer,
            weights[name],
            None if config.rounding is TemporalRounding.NEAREST else moment.mean(),
            ranges.weights[name],
            rounding,
        )
    start = _errors(finite, model, parts)
    if config.rounding is not TemporalRounding.NEAREST:
        correct_biases(finite, model, parts)
    if config.rounding is TemporalRounding.RECONSTRUCT:
        reconstruct(finite, model, parts, weights, config)
    end = _errors(finite, model, parts)
    tables = choose_tables(finite, parts, end, config.cache_ratio) if config.cache else Tables({}, {}, ())
    return _result(finite, parts, formats, timesteps, tables), _report(finite, parts, start, end, tables)


def _result(
    finite: FiniteSet, parts: QuantizedParts, formats: UnitFormats, timesteps: tuple[float, ...], tables: Tables
) -> UnitState:
    """Return the state of the block: the layers that still run, and the tables."""
    gone = {*tables.specs, *tables.unserved}
    layers = {name: spec for name, spec in formats.layers.items() if name not in gone}
    per_step = any(spec.activation and spec.activation.mode is ActivationMode.PER_STEP for spec in layers.values())
    kept = UnitFormats(formats.unit, layers, {})
    state = collect_state(parts, kept, timesteps if per_step or tables.specs else ())
    held = {f"{name}.{key}": tensor for name, table in tables.tensors.items() for key, tensor in table.items()}
    return UnitState(
        UnitFormats(formats.unit, layers, {}, tables.specs, tables.unserved), state.timesteps, {**state.tensors, **held}
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
            stored = _expand(decode_features(tables.tensors[name]), finite)
            error = feature_error(stored, finite.outputs[name])
            features[name] |= {"cosine_table": round(error.cosine, 6), "sqnr_db_table": round(error.sqnr_db, 4)}
    gone = [name for name in parts.layers if name in tables.specs or name in tables.unserved]
    return TemporalReport(
        finite.steps * finite.variants,
        dict(sorted(features.items(), key=lambda item: list(finite.layers).index(item[0]))),
        sum(_bytes(table.values()) for table in tables.tensors.values()),
        sum(_bytes(parts.layers[name].state_dict().values()) for name in gone),
        list(tables.unserved),
    )


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
    config: TemporalConfig,
) -> None:
    """Learn the rounding of all layers of the block for the error of its features alone (Eq. 7), in full batches."""
    targets = {name: finite.outputs[name] for name in finite.features()}
    before = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in parts.layers.items()}
    with torch.no_grad():
        start = _feature_loss(finite.run(model, parts), targets).item()
    roundings = [SoftRounding(parts.layers[name], weights[name], trust=config.trust) for name in weights]
    count = sum(rounding.alpha.numel() for rounding in roundings)
    optimizer = torch.optim.Adam([rounding.alpha for rounding in roundings], lr=config.lr)
    for iteration in range(config.iterations):
        for rounding in roundings:
            rounding.layer.soft_weight = rounding.weight()
        loss = _feature_loss(finite.run(model, parts), targets) / max(start, 1e-20)
        beta = anneal(iteration, config.iterations, config.warmup, config.beta)
        if beta is not None:
            loss = loss + config.rounding_weight * sum(r.regulariser(beta) for r in roundings) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for rounding in roundings:
        rounding.layer.soft_weight = None
        rounding.commit()
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


@dataclass(frozen=True, slots=True)
class Tables:
    """Features that are looked up: format and tensors by layer, and the layers that nothing needs since then."""

    specs: Mapping[str, FeatureSpec]
    tensors: Mapping[str, Mapping[str, Tensor]]
    unserved: tuple[str, ...]


def choose_tables(finite: FiniteSet, parts: QuantizedParts, errors: Mapping[str, FeatureError], ratio: float) -> Tables:
    """Decide which layers' outputs are stored, and in which format.

    Tried in turn: everything that depends on the timestep and the class label, then on the timestep alone; at 16 bits,
    then at 8. The first whose tables take at most `ratio` times the bytes of the layers that they make superfluous is
    it. Of these, a feature is taken from its table if that is nearer to full precision than the quantized layer
    (disturbance-aware selection).
    """
    labels = (LABEL,) if finite.labels is not None else ()
    for allowed in dict.fromkeys((labels, ())):
        inner = [name for name in parts.layers if set(finite.layers[name].conditions) <= set(allowed)]
        served = [name for name in inner if _is_read_outside(name, inner, finite)]
        for bits in (16, 8):
            specs = {name: FeatureSpec(bits, _labels(name, finite)) for name in served}
            tensors = {name: encode_features(_table_rows(name, finite), bits) for name in served}
            size = sum(_bytes(table.values()) for table in tensors.values())
            replaced = sum(_bytes(parts.layers[name].state_dict().values()) for name in inner)
            if served and size <= ratio * replaced:
                return _select(finite, parts, errors, specs, tensors)
    return Tables({}, {}, ())


def _select(
    finite: FiniteSet,
    parts: QuantizedParts,
    errors: Mapping[str, FeatureError],
    specs: Mapping[str, FeatureSpec],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> Tables:
    """Keep the tables that are nearer to full precision than their layers, and are needed."""
    better = {
        name
        for name, table in tensors.items()
        if feature_error(_expand(decode_features(table), finite), finite.outputs[name]).power < errors[name].power
    }
    running: set[str] = set()

    def run(name: str) -> None:
        if name not in better and name not in running:
            running.add(name)
            for source in finite.layers[name].sources:
                run(source)

    for name in finite.features():
        run(name)
    read = {source for name in running for source in finite.layers[name].sources}
    kept = [name for name in specs if name in better and (finite.layers[name].is_feature or name in read)]
    unserved = tuple(name for name in parts.layers if name not in running and name not in kept)
    return Tables({name: specs[name] for name in kept}, {name: tensors[name] for name in kept}, unserved)


def _is_read_outside(name: str, inner: Sequence[str], finite: FiniteSet) -> bool:
    """Say whether something besides the layers of `inner` reads a layer's output."""
    readers = [other for other, layer in finite.layers.items() if name in layer.sources]
    return finite.layers[name].is_feature or any(reader not in inner for reader in readers)


def _labels(name: str, finite: FiniteSet) -> int:
    """Return how many rows a layer's table has for each step."""
    return finite.labels or 1 if LABEL in finite.layers[name].conditions else 1


def _table_rows(name: str, finite: FiniteSet) -> Tensor:
    """Return the rows of a layer's table in full precision, shape (steps * labels, C)."""
    outputs = finite.outputs[name]
    return outputs if _labels(name, finite) > 1 else outputs[:: finite.variants]


def _expand(rows: Tensor, finite: FiniteSet) -> Tensor:
    """Return a table's entry for every row of the finite set."""
    return rows.repeat_interleave(finite.steps * finite.variants // len(rows), dim=0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
