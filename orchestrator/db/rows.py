"""What queries return: frozen rows, never objects that are tied to a session.

Times are seconds since 1970 UTC by the database's clock; sizes are bytes; work is GMAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.resources import Resources
from orchestrator.states import JobState, TaskState


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to finish one attempt of one task; `token` is random, so no one else can guess or repeat it."""

    task_id: str
    attempt: int
    token: str


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the jobs of a task say of where it may run, and what earlier attempts have taught.

    `device` is "auto", "cpu" or "cuda"; `alone` and `batch_divisor` follow from attempts that ran out of memory.
    """

    device: str = "auto"
    gpu_type: str | None = None
    alone: bool = False
    batch_divisor: int = 1
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A queued task that could be claimed now, as placement sees it."""

    id: str
    key: str
    kind: str
    resources: Resources
    wishes: Wishes = Wishes()
    version: int = 1

    @property
    def shards(self) -> bool:
        """Whether its kind can be spread over several GPUs."""
        from quant_spec.kinds import KINDS  # their records take longer to import than most commands

        kind = KINDS.get(self.kind)
        return kind is not None and kind.shards

    @property
    def is_unpinned(self) -> bool:
        """Whether its job wants one type of device for all its tasks, and none is chosen yet."""
        wishes = self.wishes
        if not wishes.deterministic or self.resources.gpu_memory_bytes <= 0:
            return False
        return wishes.device != "cpu" and wishes.gpu_type is None


@dataclass(frozen=True, slots=True)
class ClaimedTask:
    """A task to run, with every input resolved to a digest; `deadline_seconds` is how long its recipe lets it run."""

    lease: Lease
    kind: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, list[str]]
    resources: Resources
    work: float
    label: str
    wishes: Wishes = Wishes()
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """What a task gave: output names to digests of bytes that are in the store, and metrics (JSON, finite numbers).

    `seconds` is how long it computed, `ran` where: JSON, of which `device` ("cpu" or a GPU's type) and the peaks of
    memory go into the kind's timings.
    """

    lease: Lease
    outputs: Mapping[str, str]
    metrics: Mapping[str, Any]
    seconds: float
    ran: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EnqueueCounts:
    """Tasks of a job, and how many of them needed no computing when it was enqueued."""

    total: int
    cached: int


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A registered model; `inspection` is the JSON of `quant_core.inspect.inspection`."""

    name: str
    digest: str
    class_name: str
    source: str
    bytes: int
    parameters: int
    inspection: dict[str, Any]
    created_at: float | None = None


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job; `release` is "name@N" once it has published, `release_name` the name that it will publish under."""

    id: str
    state: JobState
    priority: int
    model_name: str
    model_digest: str
    recipe_name: str
    recipe_digest: str
    recipe: dict[str, Any]
    release_name: str | None
    target_task: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: str | None
    release: str | None
    digest: str | None
    metrics: dict[str, Any] | None
    device: str = "auto"
    gpu_type: str | None = None
    search: str | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class SearchRow:
    """A search: `spec` is what was asked for, `recipes` the base recipe and its variants by name, resolved."""

    id: str
    name: str
    owner: str
    state: JobState
    priority: int
    only: str | None
    spec: dict[str, Any]
    recipes: dict[str, Any]
    latency: dict[str, Any] | None
    digest: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    error: str | None


@dataclass(frozen=True, slots=True)
class SearchModelRow:
    """A model of a search; `job` is what its next step waits for, `parent` and `parent_model` what it starts from."""

    search: str
    name: str
    digest: str
    shape_digest: str
    state: JobState
    stage: str
    round: int
    last_round: int
    job: str | None
    parent: str | None
    parent_model: str | None
    proposed: dict[str, Any] | None
    error: str | None


@dataclass(frozen=True, slots=True)
class SearchPointRow:
    """An allocation that a search measures, and what became of the job that measures it (`measured`: its metrics)."""

    number: int
    model: str
    round: int
    stage: str
    origin: str
    budget: int | None
    allocation: dict[str, Any]
    digest: str
    job: str | None
    job_state: JobState | None
    job_error: str | None
    measured: dict[str, Any] | None
    predicted: dict[str, Any] | None
    screened: dict[str, Any] | None
    metrics: dict[str, Any] | None
    dropped: str | None
    release: str | None


@dataclass(frozen=True, slots=True)
class SearchJobCost:
    """What one job of a search took: its tasks, those it did not compute, and the seconds of both sorts."""

    job: str
    model: str
    tasks: int
    cached: int
    seconds: float
    saved_seconds: float


@dataclass(frozen=True, slots=True)
class SearchCosts:
    """What a search's jobs took: distinct tasks by state, and each job in the order in which they were made."""

    tasks: dict[str, int]
    jobs: Mapping[str, SearchJobCost]

    @property
    def spent_seconds(self) -> float:
        """Task-seconds that were computed."""
        return sum(job.seconds for job in self.jobs.values())

    @property
    def saved_seconds(self) -> float:
        """Task-seconds of results that jobs used without computing them."""
        return sum(job.saved_seconds for job in self.jobs.values())


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as one job sees it: `cached` if it needed no computing for this job.

    `outputs`, `metrics` and `seconds` are those of the recorded result, else None. `attempt` counts the leases ever
    given out; `faults_task` and `faults_infrastructure` those that ended in a fault of each sort. `ran_on` is the node
    of the last attempt, `ran` what the recorded result says of where it came from.
    """

    id: str
    key: str | None
    kind: str
    version: int
    label: str
    state: TaskState
    attempt: int
    faults_task: int
    faults_infrastructure: int
    priority: int
    resources: Resources
    work: float
    seconds: float | None
    error: str | None
    outputs: dict[str, str] | None
    metrics: dict[str, Any] | None
    not_before: float
    started_at: float | None
    finished_at: float | None
    cached: bool
    ran_on: str | None = None
    ran: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class KindRow:
    """A job's tasks of one kind: how many in each state, and the time and work of those that were computed for it.

    `queued` counts blocked tasks too, `succeeded` cached ones; `seconds` and `work` are of the tasks that succeeded
    and were not cached, `work_left` of those unfinished.
    """

    kind: str
    total: int
    cached: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    queued: int
    seconds: float
    work: float
    work_left: float


@dataclass(frozen=True, slots=True)
class EventRow:
    """One line of the log: something that happened to a task (`task` and `attempt` set) or to a job (`job` set)."""

    id: int
    job: str | None
    task: str | None
    attempt: int | None
    at: float
    event: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReleaseRow:
    """A published artifact: `name@version`, which never changes meaning, and the aliases that point at it now."""

    name: str
    version: int
    digest: str
    bytes: int
    aliases: tuple[str, ...]
    job: str
    created_at: float
    metrics: dict[str, Any]

    @property
    def ref(self) -> str:
        """Return "name@version"."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Timing:
    """What recorded tasks of one kind took in all: how many, seconds, GMAC.

    The ratios are the greatest of a task's peak of memory, of the host and of a GPU, to what had been estimated; 0
    while nothing is known.
    """

    n: int
    seconds: float
    work: float
    memory_ratio: float = 0.0
    gpu_memory_ratio: float = 0.0
