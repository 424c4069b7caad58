"""Which temporal features are kept in tables, and in which format (arXiv:2407.19547, cached temporal features)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quant_core.inspect.temporal import LABEL
from quant_core.methods.tfmq.finite_set import FeatureError, FiniteSet, feature_error
from quant_core.nn.feature_table import decode_features, encode_features
from quant_core.nn.model import QuantizedParts
from quant_spec.formats import FeatureSpec


@dataclass(frozen=True, slots=True)
class Tables:
    """Features that are looked up instead of computed.

    `specs`, `tensors`: format and content of each table, by the layer that it replaces. `unserved`: layers that are
    dropped, because only replaced layers read their outputs.
    """

    specs: Mapping[str, FeatureSpec]
    tensors: Mapping[str, Mapping[str, Tensor]]
    unserved: tuple[str, ...]


def choose_tables(finite: FiniteSet, parts: QuantizedParts, errors: Mapping[str, FeatureError], ratio: float) -> Tables:
    """Decide which layers' outputs are stored, and in which format.

    Tried in turn: all layers that depend on the timestep and the class label, then those that depend on the timestep
    alone; each first at 16 bits, then at 8. Taken is the first choice whose tables need at most `ratio` times the bytes
    of the layers that they replace. Of these, a layer is replaced only if its table is nearer to full precision than
    the quantized layer (disturbance-aware selection).
    """
    labels = (LABEL,) if finite.labels is not None else ()
    for allowed in dict.fromkeys((labels, ())):
        inner = [name for name in parts.layers if set(finite.layers[name].conditions) <= set(allowed)]
        served = [name for name in inner if _is_read_outside(name, inner, finite)]
        for bits in (16, 8):
            specs = {name: FeatureSpec(bits, _labels(name, finite)) for name in served}
            tensors = {name: encode_features(_table_rows(name, finite), bits) for name in served}
            size = sum(byte_count(table.values()) for table in tensors.values())
            replaced = sum(byte_count(parts.layers[name].state_dict().values()) for name in inner)
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
        if feature_error(table_entries(decode_features(table), finite), finite.outputs[name]).power < errors[name].power
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


def table_entries(rows: Tensor, finite: FiniteSet) -> Tensor:
    """Return a table's entry for every row of the finite set."""
    return rows.repeat_interleave(finite.steps * finite.variants // len(rows), dim=0)


def byte_count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
