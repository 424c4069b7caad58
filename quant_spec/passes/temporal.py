"""Temporal: quantize the temporal information block as a unit of its own, over all timesteps (TFMQ-DM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from quant_spec.enums import TemporalRounding
from quant_spec.record import Count, NotNegative, Positive, Record, Share


class TemporalFit(Record):
    """How the block is quantized."""

    _only_if: ClassVar[Mapping[tuple[str, Any], frozenset[str]]] = {
        ("method", TemporalRounding.RECONSTRUCT): frozenset(
            {"iterations", "lr", "trust", "rounding_weight", "warmup", "beta"}
        ),
        ("cache", True): frozenset({"cache_ratio"}),
    }

    method: TemporalRounding = Field(
        default=TemporalRounding.RECONSTRUCT,
        description="Rounding of its weights; reconstruct learns it for the features alone.",
    )
    cache: bool = Field(
        default=False,
        description="Look features up in tables (a row for each step and label); layers that are then not needed are "
        "not stored.",
    )
    cache_ratio: Positive = Field(
        default=2.0,
        description="Bytes that tables may take, per byte of the layers that they replace: 16 bits if that fits, else "
        "8, else only what depends on the timestep alone, else none.",
    )
    damping: NotNegative = Field(
        default=0.001,
        description="For closed_form and the start of reconstruct: share of the mean diagonal added to the Hessian.",
    )
    iterations: Count = Field(default=300, description="Iterations of Adam, in full batches.")
    lr: Positive = Field(default=2e-2, description="Rate of Adam at the start.")
    trust: Share = Field(
        default=0.9,
        description="How far the start leans to the closed form's codes; over the whole finite set these are close.",
    )
    rounding_weight: NotNegative = Field(
        default=100.0, description="Weight of the rounding regulariser, against a loss of 1 at the start."
    )
    warmup: Share = Field(default=0.0, description="Share of the iterations without the rounding regulariser.")
    beta: tuple[Positive, Positive] = Field(default=(4.0, 2.0), description="Sharpness of the regulariser: start, end.")

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter; nearest codes need no Hessian."""
        return super().idle_fields() | ({"damping"} if self.method is TemporalRounding.NEAREST else set())


class Temporal(TemporalFit):
    """Quantize the temporal information block as a unit of its own, over all timesteps of the sampler (TFMQ-DM)."""

    finite_set: bool = Field(
        default=True, description="Its activations have a range per trajectory step, whatever activations.mode is."
    )
