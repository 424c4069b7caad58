"""Propose: allocations worth measuring, from tables of sensitivities and from what was measured so far.

The proposals are JSON:

    {"points": [{"allocation": Allocation, "origin": "budget" | "front" | "refine" | "uniform-4" | …, "budget": place,
                 "predicted": {"damage", "psnr_db", "bytes", "bits_mean", "bops", "latency_ms", "memory_bytes"}}],
     "front": [[bytes, damage, psnr_db], …],        # a sweep of sizes over all variants, predicted
     "surrogate": {"n": measured, "residual_db": rms of what it learned from, left out one by one; null below 3},
     "infeasible": [{"budget": place, "limit": name, "got": x, "smallest": y, "largest": z}]}

`smallest` and `largest` are what the choices reach of this limit alone, whatever the others say; null where a budget's
limits contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.enums import Objective
from quant_spec.record import Bits, Count, NotNegative, Record, Seed
from quant_spec.search import SearchBudget
from quant_spec.task import Source, TaskInputs, TaskKind, TaskParams

PROPOSALS = "proposals"


class MeasuredPoint(Record):
    """What was measured of an allocation: PSNR, Fréchet distance, error of the predictions, bytes of the file."""

    allocation: Allocation
    psnr_db: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    fd: Annotated[float, Field(ge=0, le=1e12)] | None = None
    error: Annotated[float, Field(ge=0, le=1e30)] | None = None
    bytes: Annotated[int, Field(ge=0, le=2**50)]


class Params(TaskParams):
    """The space's form, the budgets, what was measured, and how much is proposed."""

    _omitted: ClassVar[frozenset[str]] = frozenset(
        {
            "per_unit",
            "keep",
            "uniform",
            "measured",
            "base",
            "activation_bits",
            "latency",
            "latency_rest_ms",
            "activation_bytes",
        }
    )

    variants: tuple[str, ...] = Field(description="Which variant of the base recipe each input table is of.")
    budgets: tuple[SearchBudget, ...] = Field(description="What points are chosen for, besides the sweep of sizes.")
    objective: Objective = Field(description="Which measured figure predictions learn from.")
    candidates: Count = Field(description="How many points are proposed at most; the budgets' own come first.")
    per_unit: bool = Field(default=False, description="Whether all layers of a unit get the same bits.")
    keep: bool = Field(default=False, description="Whether a layer may also stay in full precision.")
    uniform: bool = Field(default=False, description="Whether models with all layers at one width are proposed too.")
    measured: tuple[MeasuredPoint, ...] = Field(default=(), description="What was measured so far.")
    base: dict[str, LayerChoice] = Field(
        default={}, description="What the base recipe says of layers and attentions, where no choice does."
    )
    activation_bits: Bits | None = Field(
        default=8, description="Bits of inputs where neither a choice nor `base` says any; null is full precision."
    )
    latency: dict[str, dict[str, NotNegative]] = Field(
        default={}, description="Milliseconds of each layer in each format, such as 4/8 or float/float."
    )
    latency_rest_ms: NotNegative = Field(default=0.0, description="Milliseconds of what no layer takes.")
    activation_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        default=0, description="Bytes of activations at the peak of a prediction, beside the weights."
    )
    seed: Seed = Field(default=0, description="Of what is drawn once something was measured.")

    def idle_fields(self) -> set[str]:
        """Return the fields that cannot matter: nothing is drawn at first, uniform widths are proposed only then."""
        return super().idle_fields() | ({"uniform"} if self.measured else {"seed"})

    @model_validator(mode="after")
    def _has_latencies(self) -> Self:
        if not self.latency and any(budget.latency_ms is not None for budget in self.budgets):
            raise ValueError("latency: got none with a budget of latency_ms, wanted milliseconds of each layer")
        return self


@dataclass(frozen=True, slots=True)
class Inputs(TaskInputs[Source]):
    """Tables of sensitivities, as many as `variants`; those of one variant are merged."""

    tables: tuple[Source, ...]


KIND = TaskKind("propose", 1, "workers.tasks.propose:run", Params, Inputs, (PROPOSALS,))
