"""An allocation as a heat map: a row for each layer, a column for each point, coloured by bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.report.search_data import PointRow
from quant_spec.allocation import LayerChoice
from quant_spec.formats import SUPPORTED_BITS

#: What a layer without a choice has.
_BASE = "·"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one layer has in one point: its text and the CSS class that colours it."""

    text: str
    css_class: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One layer."""

    layer: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class HeatUnit:
    """The layers of one unit; its name is "" where it is the layer's own."""

    name: str
    rows: tuple[HeatRow, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """All units, and the layers that no point chooses anything for."""

    points: tuple[PointRow, ...]
    units: tuple[HeatUnit, ...]
    unchosen: tuple[str, ...]


def weights_map(layers: Sequence[tuple[str, str]], points: Sequence[PointRow]) -> HeatMap | None:
    """Lay out the bits of weights.

    Parameters
    ----------
    layers
        (layer, unit) in the order in which they run.
    points
        The columns.

    Returns
    -------
    HeatMap or None
        None if no point chooses bits for any layer.
    """
    return _map(layers, points, _weights_cell)


def activations_map(layers: Sequence[tuple[str, str]], points: Sequence[PointRow]) -> HeatMap | None:
    """Lay out the bits of layers' inputs, by range of steps where they differ; None if no point chooses any."""
    return _map(layers, points, _activations_cell)


def _map(
    layers: Sequence[tuple[str, str]],
    points: Sequence[PointRow],
    cell: Callable[[LayerChoice], Cell | None],
) -> HeatMap | None:
    known = {name for name, _ in layers}
    others = sorted({name for point in points for name in point.allocation.layers} - known)
    units: list[tuple[str, list[HeatRow]]] = []
    unchosen = []
    for name, unit in [*layers, *((name, name) for name in others)]:
        choices = [point.allocation.layers.get(name) for point in points]
        cells = [cell(choice) if choice is not None else None for choice in choices]
        if not any(cells):
            unchosen.append(name)
            continue
        if not units or units[-1][0] != unit:
            units.append((unit, []))
        units[-1][1].append(HeatRow(name, tuple(each or Cell(_BASE, "b0") for each in cells)))
    if not units:
        return None
    made = [HeatUnit("" if len(rows) == 1 and rows[0].layer == unit else unit, tuple(rows)) for unit, rows in units]
    return HeatMap(tuple(points), tuple(made), tuple(unchosen))


def _weights_cell(choice: LayerChoice) -> Cell | None:
    if choice.keep:
        return Cell("full", "b32")
    if choice.weight_bits is None:
        return None
    if choice.promoted:
        wider = min((bits for bits in SUPPORTED_BITS if bits > choice.weight_bits), default=choice.weight_bits)
        return Cell(f"{choice.weight_bits}+", f"b{choice.weight_bits} n{wider}")
    return Cell(str(choice.weight_bits), f"b{choice.weight_bits}")


def _activations_cell(choice: LayerChoice) -> Cell | None:
    if choice.keep:
        return Cell("full", "b32")
    bits = choice.activation_bits
    if bits is None:
        return None
    if isinstance(bits, tuple):
        mean = sum(bits) / len(bits)
        near = min(SUPPORTED_BITS, key=lambda width: abs(width - mean))
        return Cell("/".join(map(str, bits)) if len(set(bits)) > 1 else str(bits[0]), f"b{near}")
    return Cell(str(bits), f"b{bits}")
