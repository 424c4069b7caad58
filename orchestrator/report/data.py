"""What a report shows, as plain values; `orchestrator.report.collect` fills it, the template draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.report.images import Strips
from quant_spec.layer_bits import LayerBits


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer: the bits that the release has it in (None: full precision), and what rounding left of its signal."""

    name: str
    unit: str
    kind: str
    shape: tuple[int, ...]
    bits: LayerBits | None
    gmacs: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class UnitRow:
    """One reconstructed unit: signal to noise of its output on calibration samples, in dB, before and after."""

    name: str
    before_db: float
    after_db: float


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """One temporal feature: what serves it, and its signal to noise over the finite set, in dB.

    `start_db` is with rounded weights, `end_db` with what serves it in the release; `cosine` is the latter's mean
    cosine similarity with full precision.
    """

    name: str
    served: str
    start_db: float
    end_db: float
    cosine: float


@dataclass(frozen=True, slots=True)
class CorrectionRow:
    """What PTQD's correction does at one step; `gain_db` is how far it lowers the error on held-out seeds."""

    k: float
    r2: float
    uses_k: bool
    uses_bias: bool
    gain_db: float


@dataclass(frozen=True, slots=True)
class KindTime:
    """The tasks of one kind: how many, how many this job found done, and the seconds that all of them took."""

    kind: str
    tasks: int
    cached: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReportData:
    """A finished job, ready to draw; `wall_seconds` is from submission to the end."""

    job: str
    release: str
    digest: str
    model: str
    model_class: str
    model_digest: str
    parameters: int
    recipe: str
    recipe_digest: str
    recipe_yaml: str
    finished: str
    wall_seconds: float
    metrics: Mapping[str, Any]
    protocol: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    strips: tuple[Strips, ...]
    layers: tuple[LayerRow, ...]
    units: tuple[UnitRow, ...]
    features: tuple[FeatureRow, ...]
    step_bits: tuple[int, ...]
    corrections: tuple[CorrectionRow, ...]
    kinds: tuple[KindTime, ...]
