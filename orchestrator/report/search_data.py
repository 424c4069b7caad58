"""What a search's report shows, as plain values: `search_collect` fills it, `search_render` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.actions.sensitivity import Sensitivities
from orchestrator.report.images import Strips
from quant_spec.allocation import Allocation
from quant_spec.layer_bits import LayerBits

#: Origins of points that no search made: what their names begin with, and what people call them.
PAPERS = {"mpqdm": "MPQ-DM", "ptqd": "PTQD", "tfmq": "TFMQ-DM", "qdiffusion": "Q-Diffusion", "dmq": "DMQ"}
_UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class PointRow:
    """One candidate of one model.

    `stage` is `screening` (few seeds) or `final` (the full protocol). `budget` counts from 1, None for points that
    no budget chose. `predicted` has what the proposal said: `damage`, `psnr_db`, `bytes` and others. Measured values
    are None until there are any; `error` is the power of the predictions' error. `seconds` were spent on it,
    `saved_seconds` were spent already by others. `grid` shows its samples, if they are kept; `packed` are the bits
    that layers have in the file of a point on the front.
    """

    number: int
    origin: str
    stage: str
    round: int
    budget: int | None
    allocation: Allocation
    digest: str
    predicted: Mapping[str, float | None]
    bytes: int | None = None
    bits_mean: float | None = None
    bops: float | None = None
    psnr_db: float | None = None
    psnr_db_ci95: float | None = None
    fd: float | None = None
    error: float | None = None
    n: int | None = None
    on_front: bool = False
    dropped: str | None = None
    release: str | None = None
    job: str | None = None
    seconds: float | None = None
    saved_seconds: float | None = None
    grid: Strips | None = None
    packed: Mapping[str, LayerBits] = field(default_factory=dict)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same width."""
        return self.origin.partition("-")[0] == _UNIFORM

    @property
    def is_papers(self) -> bool:
        """Whether a paper's own rule made it."""
        return self.origin.partition("-")[0] in PAPERS

    @property
    def is_final(self) -> bool:
        """Whether it was measured with the full protocol."""
        return self.stage == "final" and self.bytes is not None

    @property
    def label(self) -> str:
        """What it is, in few words: its release, or where it comes from."""
        return self.release or self.origin_text

    @property
    def origin_text(self) -> str:
        """Where it comes from, for people: `uniform 4 bits`, `MPQ-DM kurtosis`, `best within budget 1`."""
        head, _, rest = self.origin.partition("-")
        if self.is_uniform:
            return f"uniform {rest} bits"
        if self.is_papers:
            return f"{PAPERS[head]} {rest.replace('-', ' ')}".strip()
        if self.origin == "budget" and self.budget is not None:
            return f"best within budget {self.budget}"
        return {"front": "proposed for the front", "refine": "refined", "warm": "from another model's front"}.get(
            self.origin, self.origin.replace("-", " ")
        )


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage of a model took: tasks, those found done, and the seconds spent and saved."""

    stage: str
    tasks: int
    cached: int
    seconds: float
    saved_seconds: float


@dataclass(frozen=True, slots=True)
class Surrogate:
    """What was learned from the measured points: how many, and how far predictions are off, in dB (rms)."""

    measured: int
    residual_db: float | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model of a search.

    `layers` are the names of its layers and attentions in the order in which they run, with their units. `front` is
    predicted: (bytes, damage, PSNR in dB) of each point. `parent` names what the search of it started from.
    """

    name: str
    digest: str
    state: str
    stage: str
    layers: tuple[tuple[str, str], ...]
    points: tuple[PointRow, ...]
    sensitivities: Sensitivities | None = None
    front: tuple[tuple[float, float, float], ...] = ()
    surrogate: Surrogate | None = None
    costs: tuple[StageCost, ...] = ()
    parent: str | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Task-seconds that were spent on it."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def saved_seconds(self) -> float:
        """Task-seconds that it did not need, because others had spent them."""
        return sum(cost.saved_seconds for cost in self.costs)

    @property
    def front_points(self) -> list[PointRow]:
        """The measured front in order of bytes: of the full protocol, or while there is none, of few seeds."""
        points = [point for point in self.points if point.on_front and point.bytes is not None]
        return sorted(points, key=lambda point: point.bytes or 0)


@dataclass(frozen=True, slots=True)
class SearchReportData:
    """A search, ready to draw.

    `budgets` are texts, `objective` is one of the spec's; `byte_budgets` are the limits in bytes that charts mark.
    `wall_seconds` is from its start to its end, or to now.
    """

    search: str
    name: str
    description: str
    owner: str
    state: str
    started: str
    finished: str | None
    wall_seconds: float
    recipe: str
    objective: str
    budgets: tuple[str, ...]
    byte_budgets: tuple[int, ...]
    protocol: str
    screening: str
    spec_yaml: str
    models: tuple[ModelReport, ...]

    @property
    def seconds(self) -> float:
        """Task-seconds that were spent."""
        return sum(model.seconds for model in self.models)

    @property
    def saved_seconds(self) -> float:
        """Task-seconds that were not needed, because they had been spent already."""
        return sum(model.saved_seconds for model in self.models)
