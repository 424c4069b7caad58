"""What a space can reach on a model, as far as its inspection tells: budgets beyond that are refused at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import SearchError
from orchestrator.planning.formats import FLOAT_BITS, choose_formats
from orchestrator.planning.model import ModelInfo
from orchestrator.search.fixed import fixed_layers
from quant_spec.numbers import human_bytes, human_count
from quant_spec.planned import PlannedLayer
from quant_spec.recipe import Recipe
from quant_spec.search import SearchSpec, Space

#: Bytes beside codes that a packed file has at most: of an output channel or group (scales, zero points, sums), of a
#: layer (names, tables of activation ranges), and of the file.
_PER_GROUP, _PER_LAYER, _PER_FILE = 64, 65_536, 1 << 20


@dataclass(frozen=True, slots=True)
class _Range:
    """Widths that a layer's weights and inputs can have, least and most."""

    weights: tuple[int, int]
    inputs: tuple[int, int]


def check_budgets(spec: SearchSpec, recipe: Recipe, model: ModelInfo) -> None:
    """Refuse limits that no choice can meet, or that every choice meets.

    What a file weighs is known exactly only once it is packed, so sizes are held against safe bounds.

    Raises
    ------
    SearchError
        With the smallest and the largest that the choices reach.
    """
    reachable = reach(spec.space, recipe, model)
    for place, budget in enumerate(spec.budgets):
        for name, limit in budget.limits().items():
            if name not in reachable:
                continue
            least, most = reachable[name]
            if not least <= limit <= most:
                raise SearchError(
                    f"budgets.{place}.{name}: got {_shown(name, limit)}, wanted {_shown(name, least)} to "
                    f"{_shown(name, most)}, which is what the choices reach"
                )


def reach(space: Space, recipe: Recipe, model: ModelInfo) -> dict[str, tuple[float, float]]:
    """Return the least and the most of each limit that the choices reach; of bytes, bounds of these."""
    widths = dict(_ranges(space, recipe, model))
    layers = model.layers
    weights = sum(layer.weights for layer in layers)
    bits = [sum(layer.weights * widths[layer.name].weights[end] for layer in layers) for end in (0, 1)]
    bops = [
        sum(float(layer.macs) * widths[layer.name].weights[end] * widths[layer.name].inputs[end] for layer in layers)
        for end in (0, 1)
    ]
    size = recipe.weights.group_size
    groups = sum(layer.shape[0] * (-(-layer.columns // size) if size else 1) for layer in layers)
    others = (model.parameters - weights) * 4 + groups * _PER_GROUP + len(layers) * _PER_LAYER + _PER_FILE
    return {
        "weight_bits_mean": (bits[0] / weights, bits[1] / weights),
        "bytes": (bits[0] / 8, bits[1] / 8 + others),
        "bops": (bops[0], bops[1]),
    }


def _ranges(space: Space, recipe: Recipe, model: ModelInfo) -> Iterator[tuple[str, _Range]]:
    """Yield the widths that each layer can have."""
    planned: Mapping[str, PlannedLayer] = {
        name: layer for unit in choose_formats(model, recipe) for name, layer in unit.planned.layers.items()
    }
    fixed = set(fixed_layers(model, space))
    for layer in model.layers:
        base = planned.get(layer.name)
        if base is None:
            yield layer.name, _Range((FLOAT_BITS, FLOAT_BITS), (FLOAT_BITS, FLOAT_BITS))
            continue
        own = base.activation.bits if base.activation is not None else FLOAT_BITS
        inputs = [own or max(space.activation_bits, default=8)]
        weights = [base.weight.bits]
        if layer.name not in fixed:
            weights += space.weight_bits
            inputs += space.activation_bits
            if space.keep:
                weights, inputs = [*weights, FLOAT_BITS], [*inputs, FLOAT_BITS]
        yield layer.name, _Range(_ends(weights), _ends(inputs))


def _ends(values: Sequence[int]) -> tuple[int, int]:
    return min(values), max(values)


def _shown(name: str, value: float) -> str:
    if name == "bytes":
        return human_bytes(value)
    return human_count(value) if name == "bops" else f"{value:.4g}"
