"""Sensitivity: damage and bytes of each choice for each layer of a group of units.

The table is JSON:

    {"layers": {name: {"weights": {"4": {"damage": x, "bytes": n}, "4+0.5": {...}, ...},
                       "activations": {"8": [x for each range of steps], ...},
                       "keep": {"damage": 0, "bytes": n}, "parameters": n, "macs": n}},
     "base_bytes": n, "unit": {name: unit}}

Damage is error power of the final sample (mean square), weighted by step gains. Attentions are among the layers,
without weights. A layer that is fixed has its base width alone. Activations: the damages of all ranges of
steps add up to that of a width at all steps. Tables of several groups are merged by `quant_spec.sensitivity_table`:
layers are united, `base_bytes` add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from quant_spec.record import Count, Share
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

TABLE = "table"


class Params(TaskParams):
    """What is measured, and on how much."""

    _omitted: ClassVar[frozenset[str]] = frozenset({"promoted", "fixed", "step_ranges", "counts_rest"})

    units: tuple[str, ...] = Field(description="All units of the model that are quantized, in the order they run.")
    layers: dict[str, int] = Field(description="Layers and attentions of the group, with their MACs per sample.")
    fixed: dict[str, int] = Field(default={}, description="Layers that stay at a width, which is the only one told.")
    promoted: tuple[Share, ...] = Field(default=(), description="Shares of output channels at the next width.")
    step_ranges: Count = Field(default=1, description="Equal ranges of trajectory steps with bits of their own.")
    path: Literal[0, 1, 2] = Field(description="Path points; 0 measures in the full-precision network.")
    rows: Count = Field(description="Calibration rows, most where most of the damage is made; one a range at least.")
    forward_batch_size: Count = Field(description="Samples through the whole model at once.")
    counts_rest: bool = Field(default=False, description="Whether `base_bytes` has what is not quantized.")


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """The model's tree, shards of its calibration, gains, and states of the menu.

    `context`: weights of all units at the middle width. `weights`, `activations`, `errors`: of the group's units at all
    widths. `temporal`: the state of the temporal block, if it is a unit of its own.
    """

    model: Source
    calibration: tuple[Source, ...]
    gains: Source
    context: tuple[Source, ...]
    weights: tuple[Source, ...] = ()
    activations: tuple[Source, ...] = ()
    errors: tuple[Source, ...] = ()
    temporal: Source | None = None


KIND = TaskKind(
    "sensitivity",
    3,
    "workers.tasks.sensitivity:run",
    Params,
    Inputs,
    (TABLE,),
    gpu=True,
    batch_free="forward_batch_size",
)
