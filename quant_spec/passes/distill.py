"""Distill: tune weights, grids and activation steps of the whole model, end to end (MPQ-DM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from quant_spec.enums import WeightCodes
from quant_spec.record import Count, Grown, Positive, Seed


class DistillFit(Grown):
    """How a model is distilled."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("relations", True): frozenset({"relation_weight", "positions"}),
        ("codes", WeightCodes.LEARNED): frozenset({"rank", "lr"}),
        ("codes", WeightCodes.FROZEN): frozenset({"norm_lr"}),
    }
    _omitted: ClassVar[frozenset[str]] = frozenset({"effect", "codes"})
    _later: ClassVar[frozenset[str]] = frozenset({"codes", "norm_lr"})

    codes: WeightCodes = Field(
        default=WeightCodes.LEARNED,
        description="Whether codes of weights are learned too, or frozen: then only scales, biases, the affine "
        "parameters of norms and the grids of activations are.",
    )

    iterations: Count = Field(default=1200, description="Iterations of Adam; all rates fall linearly to 0.")
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = Field(
        default=8, description="Samples per iteration, in pairs of consecutive steps."
    )
    effect: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Power of what an error at each step does to the final sample that the step's loss is weighted "
        "by: 0 counts all steps alike.",
    )
    rank: Count = Field(default=32, description="Rank of the update of the weights, merged before they are quantized.")
    lr: Positive = Field(default=1e-2, description="Rate of the low-rank factors, per mean step size of the layer.")
    weight_lr: Positive = Field(default=1e-3, description="Rate of the weights' step sizes, as logarithms.")
    activation_lr: Positive = Field(
        default=2e-3,
        description="Rate of the activations' step sizes (at each trajectory step, where they are per step), as "
        "logarithms.",
    )
    zero_point_lr: Positive = Field(default=2e-3, description="Rate of all zero points, in codes.")
    bias_lr: Positive = Field(default=3e-4, description="Rate of the biases.")
    norm_lr: Positive = Field(default=1e-3, description="Rate of the weights and biases of norms.")
    relations: bool = Field(
        default=True,
        description="Distil, besides the prediction, how positions of the last block's output relate, averaged over "
        "the pair of steps.",
    )
    relation_weight: Positive = Field(
        default=25_600.0,
        description="Weight of the relations, averaged over positions, in the loss; as the paper's 100 of the sum over "
        "256 positions.",
    )
    positions: Count = Field(
        default=256, description="Positions that are related, drawn anew in each iteration if there are more."
    )


class Distill(DistillFit):
    """Tune weights (low rank, merged before they are quantized), grids and activation steps, end to end (MPQ-DM).

    With frozen codes: scales, biases, norms and activation steps around them.
    """

    seeds: Count = Field(default=64, description="Full-precision trajectories that are distilled from.")
    first_seed: Seed = Field(default=4_000_000, description="First of their seeds.")
    shard_seeds: Count = Field(default=16, description="Seeds per task.")
