"""An allocation as a heat map: a row for each layer, a column for each point, coloured by bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.report.search_data import PointRow
from quant_spec.allocation import LayerChoice
from quant_spec.formats import SUPPORTED_BITS
from quant_spec.layer_bits import LayerBits, nearest_width

#: What a layer has of which nothing is known.
_BASE = "·"


@dataclass(frozen=True, slots=True)
class Cell:
    """What one layer has in one point: its text and the CSS class that colours it."""

    text: str
    css_class: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """A row of the heat map: the choices of one layer, point after point."""

    layer: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class HeatUnit:
    """The layers of one unit; its name is "" where it is the layer's own."""

    name: str
    rows: tuple[HeatRow, ...]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """All units, and the layers of which nothing is known here: no point chooses for them, no file has bits of them."""

    points: tuple[PointRow, ...]
    units: tuple[HeatUnit, ...]
    unchosen: tuple[str, ...]


def weights_map(layers: Sequence[tuple[str, str]], points: Sequence[PointRow]) -> HeatMap | None:
    """Lay out the bits of weights: those that were chosen, and paler what the packed file has without a choice.

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
    return _map(layers, points, _weights_choice, _packed_weights)


def activations_map(layers: Sequence[tuple[str, str]], points: Sequence[PointRow]) -> HeatMap | None:
    """Lay out the bits of layers' inputs, by range of steps where they differ; None if no point chooses any."""
    return _map(layers, points, _activations_choice, _packed_activations)


def _map(
    layers: Sequence[tuple[str, str]],
    points: Sequence[PointRow],
    chosen: Callable[[LayerChoice], Cell | None],
    packed: Callable[[LayerBits], Cell | None],
) -> HeatMap | None:
    known = {name for name, _ in layers}
    others = sorted({name for point in points for name in point.allocation.layers} - known)
    units: list[tuple[str, list[HeatRow]]] = []
    unchosen, any_choice = [], False
    for name, unit in [*layers, *((name, name) for name in others)]:
        choices = [point.allocation.layers.get(name) for point in points]
        cells = [None if choice is None else chosen(choice) for choice in choices]
        any_choice = any_choice or any(cells)
        bits = [point.packed.get(name) for point in points]
        cells = [cell or (None if found is None else packed(found)) for cell, found in zip(cells, bits, strict=True)]
        if not any(cells):
            unchosen.append(name)
            continue
        if not units or units[-1][0] != unit:
            units.append((unit, []))
        units[-1][1].append(HeatRow(name, tuple(each or Cell(_BASE, "b0") for each in cells)))
    if not any_choice:
        return None
    made = [HeatUnit("" if len(rows) == 1 and rows[0].layer == unit else unit, tuple(rows)) for unit, rows in units]
    return HeatMap(tuple(points), tuple(made), tuple(unchosen))


def _weights_choice(choice: LayerChoice) -> Cell | None:
    if choice.keep:
        return Cell("full", "b32")
    if choice.weight_bits is None:
        return None
    if choice.promoted:
        wider = min((bits for bits in SUPPORTED_BITS if bits > choice.weight_bits), default=choice.weight_bits)
        return Cell(f"{choice.weight_bits}+", f"b{choice.weight_bits} n{wider}")
    return Cell(str(choice.weight_bits), f"b{choice.weight_bits}")


def _packed_weights(bits: LayerBits) -> Cell | None:
    width = bits.weights if bits.table is None else bits.table
    if bits.is_dropped or width is None:
        return None
    return Cell(f"{width:.1f}" if bits.mixture else f"{width:g}", f"b{nearest_width(width)} base")


def _activations_choice(choice: LayerChoice) -> Cell | None:
    if choice.keep:
        return Cell("full", "b32")
    bits = choice.activation_bits
    if bits is None:
        return None
    if isinstance(bits, tuple):
        words = "/".join(map(str, bits)) if len(set(bits)) > 1 else str(bits[0])
        return Cell(words, f"b{nearest_width(sum(bits) / len(bits))}")
    return Cell(str(bits), f"b{bits}")


def _packed_activations(bits: LayerBits) -> Cell | None:
    if bits.activations is None:
        return None
    width = bits.activations
    return Cell(f"{width:.1f}" if bits.step_bits else f"{width:g}", f"b{nearest_width(width)} base")
