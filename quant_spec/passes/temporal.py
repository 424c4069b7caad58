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
    cache: bool = Field(default=False, description="Look features up in tables instead of computing them.")
    cache_ratio: Positive = Field(
        default=2.0, description="Bytes that tables may take, per byte of the layers that they replace."
    )
    damping: NotNegative = Field(default=0.001, description="Share of the mean diagonal added to the Hessian.")
    iterations: Count = 300
    lr: Positive = 2e-2
    trust: Share = Field(default=0.9, description="As in reconstruct; closed form over the whole finite set is close.")
    rounding_weight: NotNegative = 100.0
    warmup: Share = 0.0
    beta: tuple[Positive, Positive] = (4.0, 2.0)


class Temporal(TemporalFit):
    """Quantize the temporal information block as a unit of its own, over all timesteps of the sampler (TFMQ-DM)."""

    finite_set: bool = Field(
        default=True, description="Its activations have a range per trajectory step, whatever activations.mode is."
    )
