"""Distill: tune weights, grids and activation steps of the whole model, end to end (MPQ-DM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from quant_spec.record import Count, Positive, Record, Seed


class DistillFit(Record):
    """How a model is distilled."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("relations", True): frozenset({"relation_weight", "positions"})
    }

    iterations: Count = 1200
    batch_size: Annotated[int, Field(ge=2)] = Field(
        default=8, description="Samples per iteration, in pairs of consecutive steps."
    )
    rank: Count = 32
    lr: Positive = Field(default=1e-2, description="Rate of the low-rank factors, per mean step of the layer.")
    weight_lr: Positive = Field(default=1e-3, description="Rate of the weights' step sizes, as logarithms.")
    activation_lr: Positive = Field(default=2e-3, description="Rate of the activations' step sizes, as logarithms.")
    zero_point_lr: Positive = Field(default=2e-3, description="Rate of all zero points, in codes.")
    bias_lr: Positive = 3e-4
    relations: bool = Field(default=True, description="Distil time-smoothed relations too, not predictions alone.")
    relation_weight: Positive = 100.0
    positions: Count = Field(
        default=256, description="Positions of the feature that are related, drawn if it has more."
    )


class Distill(DistillFit):
    """Tune weights (low rank, merged before they are quantized), grids and activation steps, end to end (MPQ-DM)."""

    seeds: Count = Field(default=64, description="Full-precision trajectories that are distilled from.")
    first_seed: Seed = 4_000_000
    shard_seeds: Count = Field(default=16, description="Seeds per task.")
