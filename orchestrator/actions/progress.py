"""A job's progress while it runs: what is done, what runs, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self, TextIO

from orchestrator.actions.cluster import gpu_text
from orchestrator.actions.live import Live
from orchestrator.db.clock import database_time
from orchestrator.db.jobs import find_job, job_kinds, list_tasks
from orchestrator.db.orchestrators import gpu_types
from orchestrator.db.rows import KindRow
from orchestrator.db.session import Database
from orchestrator.db.timings import kind_timings
from orchestrator.db.waiting import job_in_front, job_waiting
from orchestrator.planning.estimate import Rate, fitted_rates
from orchestrator.scheduling.running import REPORTING, RunningTask, running_tasks, step_text
from orchestrator.text import human_seconds
from quant_spec.kinds import KINDS
from workers.storage.store import Store

if TYPE_CHECKING:
    from rich.table import Table

_TELLING_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job at one moment.

    `eta_seconds` is what is left of it by recorded times and what long tasks say themselves, `waiting` what it
    waits for beyond its turn. `gpus` says how the cluster's GPUs are used, "" where there are none.
    `behind` is a job that runs while this one has not begun.
    """

    job: str
    state: str
    model: str
    recipe: str
    kinds: tuple[KindRow, ...]
    seconds: float
    eta_seconds: float
    steps: tuple[RunningTask, ...] = ()
    gpus: str = ""
    waiting: str | None = None
    behind: str | None = None

    @property
    def total(self) -> int:
        """Tasks in all."""
        return sum(kind.total for kind in self.kinds)

    @property
    def done(self) -> int:
        """Tasks that need nothing more, the cached ones included."""
        return sum(kind.succeeded for kind in self.kinds)

    @property
    def computed(self) -> int:
        """Tasks that were computed for this job."""
        return sum(kind.succeeded - kind.cached for kind in self.kinds)

    @property
    def running(self) -> int:
        """Tasks that run now."""
        return sum(kind.running for kind in self.kinds)

    @property
    def content(self) -> tuple[object, ...]:
        """What is worth another line if it changes."""
        return self.state, self.done, self.running, self.total, self.steps, self.behind

    @property
    def news(self) -> str | None:
        """What is worth another line at once: that all wait, and for what."""
        return self.waiting

    def line(self) -> str:
        """Return it as one line of text."""
        return progress_line(self)

    def table(self, per_second: float) -> Table:
        """Return it as a table for a terminal."""
        return progress_table(self, per_second)


@dataclass(frozen=True, slots=True)
class Width:
    """How many tasks run at once: on CPUs, and on GPUs where there are any."""

    cpus: int
    gpus: int = 0

    @classmethod
    def of(cls, cluster: Mapping[str, Any], least_cpus: int) -> Self:
        """Return that of a cluster: as many on GPUs as run there now, at least one on each."""
        nodes = [node for node in cluster.get("nodes", ()) if not node["left_out"]]
        cpus = sum(int(node["cpus"]) for node in nodes)
        return cls(cpus or least_cpus, sum(max(node["gpus"], node["gpu_tasks"]) for node in nodes))

    def at_once(self, kind: str) -> int:
        """Return how many tasks of a kind run at once."""
        on_gpu = self.gpus and kind in KINDS and KINDS[kind].gpu
        return max(self.gpus if on_gpu else self.cpus, 1)


def remaining_seconds(kinds: Sequence[KindRow], rates: Mapping[str, Rate], width: Width) -> float:
    """Estimate the time that is left, in seconds.

    Parameters
    ----------
    kinds
        The job's tasks. A kind is judged by its own times once the job has computed a tenth of its work: the first
        tasks to end are the small ones, which say little about the others.
    rates
        What tasks of the other kinds take (`orchestrator.planning.estimate.fitted_rates`).
    width
        How many tasks run at once.
    """
    total = 0.0
    for kind in kinds:
        left = kind.total - kind.succeeded - kind.failed - kind.cancelled
        computed = kind.succeeded - kind.cached
        if computed and kind.work > 0 and kind.work >= _TELLING_SHARE * kind.work_left:
            seconds = kind.seconds / kind.work * kind.work_left
        elif kind.kind in rates:
            seconds = rates[kind.kind].fixed * left + rates[kind.kind].per_gmac * kind.work_left
        else:
            seconds = kind.seconds / computed * left if computed else 0.0
        total += seconds / width.at_once(kind.kind)
    return total


def seconds_left(
    kinds: Sequence[KindRow], rates: Mapping[str, Rate], width: Width, steps: Sequence[RunningTask]
) -> float:
    """Estimate the time that is left, in seconds: what long tasks say themselves, then all that is not theirs."""
    timed = [each for each in steps if each.progress.seconds_left is not None]
    others = []
    for kind in kinds:
        left = kind.total - kind.succeeded - kind.failed - kind.cancelled
        own = min(left, sum(each.kind == kind.kind for each in timed))
        share = kind.work_left * (left - own) / max(left, 1)
        others.append(replace(kind, total=kind.total - own, work_left=share))
    return max((each.progress.seconds_left or 0.0 for each in timed), default=0.0) + remaining_seconds(
        others, rates, width
    )


def recorded_rates(database: Database, types: Collection[str] = ()) -> dict[str, Rate]:
    """Return what tasks of each kind take, by those that were ever computed; on these types of GPU, where known."""
    with database.session(read_only=True) as session:
        return fitted_rates(kind_timings(session, types))


@dataclass(slots=True)
class Pacer:
    """What is known of how fast tasks go: on the types of GPU that the cluster has now, on its CPUs, or here."""

    database: Database
    workers: int
    cluster: Callable[[], Mapping[str, Any]]
    _types: frozenset[str] | None = None
    _rates: Mapping[str, Rate] = field(default_factory=dict)

    def now(self) -> tuple[Mapping[str, Rate], Width, str]:
        """Return rates, how many tasks run at once, and how the GPUs are used."""
        cluster = self.cluster()
        types = frozenset(gpu_types({"": cluster}))
        if types != self._types:
            self._rates, self._types = recorded_rates(self.database, types), types
        return self._rates, Width.of(cluster, self.workers), gpu_text(cluster)


def take_snapshot(database: Database, store: Store, job_id: str, pacer: Pacer) -> Snapshot:
    """Read a job's progress."""
    rates, width, gpus = pacer.now()
    with database.session(read_only=True) as session:
        job = find_job(session, job_id)
        kinds = tuple(job_kinds(session, job_id))
        now = database_time(session)
        waiting, behind = job_waiting(session, job), job_in_front(session, job)
        long = [kind.kind for kind in kinds if kind.running and kind.kind in REPORTING]
        rows = [task for kind in long for task in list_tasks(session, job_id, kind=kind)]
    steps = running_tasks(rows, store)
    seconds = (job.finished_at or now) - (job.started_at or job.created_at)
    eta = seconds_left(kinds, rates, width, steps)
    names = (job.id, job.state.value, job.model_name, job.recipe_name)
    return Snapshot(*names, kinds, max(seconds, 0.0), eta, steps, gpus, waiting, behind)


def show_progress(
    database: Database,
    store: Store,
    job_id: str,
    *,
    workers: int,
    cluster: Callable[[], Mapping[str, Any]] = dict,
    stream: TextIO | None = None,
) -> Live:
    """Show a job's progress while a block runs."""
    pacer = Pacer(database, workers, cluster)
    return Live(lambda: take_snapshot(database, store, job_id, pacer), stream)


def progress_line(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of text."""
    parts = [f"{snapshot.state} {snapshot.done}/{snapshot.total} tasks"]
    parts += [f"waiting for the {snapshot.waiting}"] if snapshot.waiting else []
    parts += [f"behind job {snapshot.behind}"] if snapshot.behind else []
    busy = [f"{kind.kind} {kind.succeeded}/{kind.total}" for kind in snapshot.kinds if kind.running]
    parts += [f"running {', '.join(busy)}"] if busy else []
    parts += [step_text(each.document()) for each in snapshot.steps]
    parts += [snapshot.gpus] if snapshot.gpus else []
    parts.append(human_seconds(snapshot.seconds))
    if snapshot.state in ("queued", "running") and not snapshot.waiting:
        parts.append(f"about {human_seconds(snapshot.eta_seconds)} left")
    return f"job {snapshot.job}: " + "; ".join(parts)


def progress_table(snapshot: Snapshot, per_second: float) -> Table:
    """Return a snapshot as a table for a terminal."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    caption = f"{snapshot.done}/{snapshot.total} tasks, {human_seconds(snapshot.seconds)}"
    if snapshot.state in ("queued", "running"):
        caption += f", {per_second:.2f} tasks/s, about {human_seconds(snapshot.eta_seconds)} left"
    caption += f"; waiting for the {snapshot.waiting}" if snapshot.waiting else ""
    caption += f"; behind job {snapshot.behind}" if snapshot.behind else ""
    caption += "".join(f"; {step_text(each.document())}" for each in snapshot.steps)
    caption += f"; {snapshot.gpus}" if snapshot.gpus else ""
    table = Table(
        title=f"job {snapshot.job}  {snapshot.recipe} on {snapshot.model}  {snapshot.state}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("kind")
    table.add_column("")
    for name in ("done", "cached", "running", "queued", "failed", "s/task"):
        table.add_column(name, justify="right")
    for kind in snapshot.kinds:
        computed = kind.succeeded - kind.cached
        table.add_row(
            kind.kind,
            ProgressBar(total=max(kind.total, 1), completed=kind.succeeded, width=24),
            f"{kind.succeeded}/{kind.total}",
            *(str(count) if count else "" for count in (kind.cached, kind.running, kind.queued, kind.failed)),
            f"{kind.seconds / computed:.1f}" if computed else "",
        )
    return table
