"""What a table of sensitivities says: which layers cost most, why, and where the next bit pays most.

Damage is what a choice does to the final sample, as error power: that of the prediction, weighted by what an error at
each step does later, summed over steps. It adds up over layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.db.registry import find_model
from orchestrator.db.rows import ModelRow
from orchestrator.db.searches import find_search, search_models, tables_read
from orchestrator.errors import NotFoundError
from orchestrator.planning.model import ModelInfo
from orchestrator.service import Service
from orchestrator.text import table
from quant_spec.documents import read_json
from quant_spec.errors import InvalidInputError
from quant_spec.numbers import human_bytes, human_count
from quant_spec.sensitivity_table import merge_tables
from workers.storage.store import Store

#: Layers that the text names, by default.
MOST_LAYERS = 15


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of a layer's weights: its name in the table (`4`, `4+0.5`, `keep`), damage, bytes in the file."""

    label: str
    damage: float
    bytes: int

    @property
    def width(self) -> float:
        """Its bits, a half of the channels at the next width as half a bit, so that choices sort; `keep` is 32."""
        return 32.0 if self.label == KEEP else sum(map(float, self.label.split("+")))


#: The name of full precision among a layer's choices.
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One layer: its weights' choices in order of bits, and its inputs' damage by width, for each range of steps."""

    name: str
    unit: str
    parameters: int
    macs: int
    weights: tuple[Option, ...]
    activations: Mapping[str, tuple[float, ...]]

    def option(self, label: str) -> Option | None:
        """Return a choice by its name, if the layer has it."""
        return next((option for option in self.weights if option.label == label), None)

    def at_most(self, width: float) -> Option | None:
        """Return the choice with the most bits that has at most so many; else the one with the fewest."""
        fitting = [option for option in self.weights if option.width <= width]
        return fitting[-1] if fitting else next(iter(self.weights), None)


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """A model's table: its layers in the order in which they run, as far as that is known, and the other bytes."""

    layers: tuple[LayerSensitivity, ...]
    base_bytes: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of all weight choices that some layer has, in order of bits."""
        options = {option.label: option.width for layer in self.layers for option in layer.weights}
        return tuple(sorted(options, key=lambda label: options[label]))

    @property
    def middle(self) -> str:
        """The middle one of the widths for a whole layer, 4 of 2, 3, 4, 5, 6, 8; `keep` where there is no width."""
        widths = [label for label in self.labels if label != KEEP and "+" not in label]
        return widths[(len(widths) - 1) // 2] if widths else KEEP

    def damage_at(self, label: str) -> float:
        """Return the damage of all weights together at one choice, or at the nearest that a layer has below it."""
        width = Option(label, 0.0, 0).width
        return sum(option.damage for layer in self.layers if (option := layer.at_most(width)))


@dataclass(frozen=True, slots=True)
class Step:
    """One layer's step from one choice to another: what it adds to the file, and by how much damage falls."""

    layer: LayerSensitivity
    start: Option
    end: Option

    @property
    def bytes(self) -> int:
        """Bytes that it adds; negative where it saves."""
        return self.end.bytes - self.start.bytes

    @property
    def drop(self) -> float:
        """By how much damage falls; negative where it rises."""
        return self.start.damage - self.end.damage

    @property
    def per_byte(self) -> float:
        """Damage that each byte takes away; of a step down, damage that each byte saved adds."""
        return self.drop / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class ModelTables:
    """A model's tables as JSON, by variant of the base recipe (`base` first), and what is known beside them.

    `order` are the names of its layers and attentions in the order in which they run, `front` is the predicted front.
    """

    model: str
    tables: Mapping[str, dict[str, Any]]
    order: tuple[str, ...]
    front: Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class SearchTables:
    """The tables of a search's models."""

    search: str
    models: tuple[ModelTables, ...]


def find_sensitivities(service: Service, prefix: str, model: str | None = None) -> SearchTables:
    """Return the tables that a search's proposals were made from, all or one model's.

    Raises
    ------
    NotFoundError
        If there is no such search, or none of its models (or not this one) has a table yet.
    BlobLostError
        If its bytes are lost.
    """
    with service.database.session(read_only=True) as session:
        search = find_search(session, prefix)
        rows = [row for row in search_models(session, search.id) if model is None or row.name == model]
        orders = {row.name: tuple(name for name, _ in layer_order(find_model(session, row.name))) for row in rows}
        digests = {row.name: tables_read(session, search.id, row.name) for row in rows}
    found = tuple(
        ModelTables(row.name, read_tables(service.store, read), orders[row.name], (row.proposed or {}).get("front", ()))
        for row in rows
        if (read := digests[row.name])
    )
    if not found:
        whose = "any of its models" if model is None else f"a model {model}"
        raise NotFoundError(f"search {search.id}: got no table of sensitivities, wanted one of {whose}")
    return SearchTables(search.id, found)


def read_tables(store: Store, digests: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Read a model's tables, those of all groups of its layers in one, by variant.

    Raises
    ------
    BlobLostError
        If bytes are lost.
    """
    return {
        variant: merge_tables([read_json(store.get_bytes(digest), "table of sensitivities") for digest in groups])
        for variant, groups in digests.items()
    }


def layer_order(model: ModelRow) -> list[tuple[str, str]]:
    """Return a model's layers and attentions in the order in which they run, each with its unit."""
    return [
        (name, unit.name)
        for unit in ModelInfo.read(model.digest, model.inspection).units
        for name in (*(layer.name for layer in unit.layers), *unit.attentions)
    ]


def read_sensitivities(document: Mapping[str, Any], order: Sequence[str] = ()) -> Sensitivities:
    """Return a table's JSON as records.

    Parameters
    ----------
    document
        `layers`, `base_bytes` and `unit`, as the task kind `sensitivity` writes them.
    order
        Names of layers in the order in which they run; others follow in the document's.
    """
    entries = document["layers"]
    known = [name for name in order if name in entries]
    names = known + [name for name in entries if name not in set(known)]
    return Sensitivities(
        tuple(_layer(name, entries[name], document["unit"].get(name, name)) for name in names), document["base_bytes"]
    )


def _layer(name: str, entry: Mapping[str, Any], unit: str) -> LayerSensitivity:
    options = [
        Option(label, float(each["damage"]), int(each["bytes"])) for label, each in entry.get("weights", {}).items()
    ]
    if entry.get(KEEP):
        options.append(Option(KEEP, float(entry[KEEP]["damage"]), int(entry[KEEP]["bytes"])))
    return LayerSensitivity(
        name=name,
        unit=unit,
        parameters=int(entry.get("parameters", 0)),
        macs=int(entry.get("macs", 0)),
        weights=tuple(sorted(options, key=lambda option: (option.width, option.bytes))),
        activations={label: tuple(map(float, each)) for label, each in entry.get("activations", {}).items()},
    )


def next_steps(sensitivities: Sensitivities, label: str) -> list[Step]:
    """Return each layer's best step up from a choice, that where a byte takes away the most damage first.

    A layer's best step may skip a width. Layers for which nothing above helps are left out.
    """
    steps = []
    for layer, start in _starts(sensitivities, label):
        ups = [
            Step(layer, start, end) for end in layer.weights if end.bytes > start.bytes and end.damage < start.damage
        ]
        steps += [max(ups, key=lambda step: step.per_byte)] if ups else []
    return sorted(steps, key=lambda step: -step.per_byte)


def spare_steps(sensitivities: Sensitivities, label: str) -> list[Step]:
    """Return each layer's best step down from a choice, that where a byte saved adds the least damage first."""
    steps = []
    for layer, start in _starts(sensitivities, label):
        downs = [Step(layer, start, end) for end in layer.weights if end.bytes < start.bytes]
        steps += [min(downs, key=lambda step: step.per_byte)] if downs else []
    return sorted(steps, key=lambda step: step.per_byte)


def _starts(sensitivities: Sensitivities, label: str) -> list[tuple[LayerSensitivity, Option]]:
    width = Option(label, 0.0, 0).width
    return [(layer, option) for layer in sensitivities.layers if (option := layer.at_most(width))]


def smallest_within(front: Sequence[Sequence[float | None]], most: int = 12) -> list[tuple[float, int]]:
    """Answer the inverse question from a predicted front: for whole numbers of dB, the smallest file that reaches them.

    Parameters
    ----------
    front
        (bytes, damage, PSNR in dB) of each point, as `propose` writes it; no PSNR where the objective is another.
    most
        Levels at most, from the best that is reached down to the worst, each the best for its size.
    """
    reached = [
        (psnr_db, round(size or 0)) for size, _, psnr_db in front if psnr_db is not None and math.isfinite(psnr_db)
    ]
    if not reached:
        return []
    found: list[tuple[float, int]] = []
    for level in range(math.floor(max(reached)[0]), math.floor(min(reached)[0]) - 1, -1):
        size = min(size for psnr_db, size in reached if psnr_db >= level)
        if not found or found[-1][1] != size:
            found.append((float(level), size))
    stride = (len(found) - 1) / max(most - 1, 1)
    return found if len(found) <= most else [found[round(place * stride)] for place in range(most)]


def share_text(part: float, whole: float) -> str:
    """Return a share as `12.3 %`."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def sensitivity_text(
    document: Mapping[str, Any],
    *,
    model: str,
    order: Sequence[str] = (),
    front: Sequence[Sequence[float | None]] = (),
    start: str | None = None,
    most: int = MOST_LAYERS,
) -> str:
    """Return what a table says, for a terminal: totals, where the next bit pays most, where it is missed least.

    Parameters
    ----------
    document
        The JSON that the task kind `sensitivity` writes.
    model
        The model's name.
    order
        Names of its layers in the order in which they run.
    front
        The predicted front of `propose`, (bytes, damage, PSNR in dB), for the smallest file within a given error.
    start
        The choice of weight bits that all layers start from, such as `4`; by default the middle one.
    most
        Layers that each list names at most.

    Raises
    ------
    InvalidInputError
        If no layer has the choice `start`.
    """
    found = read_sensitivities(document, order)
    start = start if start is not None else found.middle
    if start not in found.labels:
        raise InvalidInputError(f"--start: got {start}, wanted one of {', '.join(found.labels)}")
    weights = sum(layer.parameters for layer in found.layers)
    lines = [
        f"{model}: {len(found.layers)} layers, {human_count(weights)} weights, "
        f"{human_bytes(found.base_bytes, 2)} beside them. Damage: error power of the final sample.",
        "",
        table(("all layers at", "damage", "bytes"), _totals(found)),
        "",
        f"where the next bit pays most, all else at {start}:",
        _steps_table(found, next_steps(found, start)[:most], start),
        "",
        f"where bits are missed least, all else at {start}:",
        _steps_table(found, spare_steps(found, start)[:most], start),
    ]
    if any(layer.activations for layer in found.layers):
        lines += ["", "inputs that cost most:", _inputs_table(found, most)]
    if front:
        rows = [(f"{level:g} dB", human_bytes(size, 2)) for level, size in smallest_within(front)]
        lines += ["", "smallest file that is predicted to reach:", table(("PSNR", "bytes"), rows)]
    return "\n".join(lines)


def total_bytes(sensitivities: Sensitivities, label: str) -> int:
    """Return the bytes of the file with all layers at one choice, or at the nearest that a layer has below it."""
    return sensitivities.base_bytes + sum(option.bytes for _, option in _starts(sensitivities, label))


def _totals(found: Sensitivities) -> list[tuple[str, str, str]]:
    return [
        (label, f"{found.damage_at(label):.3g}", human_bytes(total_bytes(found, label), 2)) for label in found.labels
    ]


def _steps_table(found: Sensitivities, steps: Sequence[Step], label: str) -> str:
    whole = found.damage_at(label)
    weights = sum(layer.parameters for layer in found.layers)
    rows = [
        (
            step.layer.name,
            f"{step.start.label} -> {step.end.label}",
            share_text(step.start.damage, whole),
            share_text(step.layer.parameters, weights),
            f"{-step.drop:+.2g}",
            f"{step.bytes:+d}",
            f"{step.per_byte * 1000:.2g}",
        )
        for step in steps
    ]
    header = ("layer", "bits", "of damage", "of weights", "damage", "bytes", "per kB")
    return table(header, rows) if rows else "none"


def input_costs(found: Sensitivities) -> list[tuple[LayerSensitivity, str, float]]:
    """Return each layer's inputs at the narrowest width, (layer, width, damage over all steps), the costliest first."""
    costs = []
    for layer in found.layers:
        if layer.activations:
            label = min(layer.activations, key=float)
            costs.append((layer, label, sum(layer.activations[label])))
    return sorted(costs, key=lambda cost: -cost[2])


def _inputs_table(found: Sensitivities, most: int) -> str:
    costs = input_costs(found)
    whole = sum(damage for _, _, damage in costs)
    rows = [
        (layer.name, label, f"{damage:.2g}", share_text(damage, whole), *_ranges(layer.activations[label]))
        for layer, label, damage in costs[:most]
    ]
    return table(("layer", "bits", "damage", "of inputs' damage", "by range of steps"), rows)


def _ranges(damages: Sequence[float]) -> tuple[str]:
    return (" ".join(f"{damage:.1g}" for damage in damages) if len(damages) > 1 else "-",)
