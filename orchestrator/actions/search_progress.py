"""A search's progress while it runs: each model's stage, tasks and front so far.

Whoever runs a search reads a `SearchProgress` every now and then and shows it by

    with Live(take, stream):            # orchestrator.actions.live; take() -> SearchProgress
        ...

which is a live table on a terminal, lines anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.text import human_seconds
from quant_spec.numbers import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

#: A table has at most this many models, those that run first, and this many points of each one's front.
MOST_MODELS, MOST_POINTS = 16, 5
_ACTIVE = ("queued", "running")


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A measured point that no other measured point of its model beats.

    `validated` says that it was measured with the full protocol, `release` is `name@N` once it is published.
    """

    bytes: int
    psnr_db: float
    validated: bool
    release: str | None = None


@dataclass(frozen=True, slots=True)
class ModelProgress:
    """One model of a search at one moment.

    `stage` is `sensitivity`, `screening`, `final` or `done`; `round` counts from 1 while candidates are screened, of
    `rounds`. Of the tasks that are done, `cached` were computed by another job. `front` is in order of bytes.
    """

    name: str
    state: str
    stage: str
    round: int
    rounds: int
    total: int
    done: int
    cached: int
    running: int
    queued: int
    front: tuple[FrontPoint, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """A search at one moment.

    `eta_seconds` is what is left of the tasks that are planned by now, None where nothing tells; `waiting` is what all
    orchestrators wait for, if they do. `gpus` says how the cluster's GPUs are used, "" where there are none.
    """

    search: str
    name: str
    state: str
    models: tuple[ModelProgress, ...]
    seconds: float
    eta_seconds: float | None = None
    waiting: str | None = None
    gpus: str = ""

    @property
    def total(self) -> int:
        """Tasks that are planned by now."""
        return sum(model.total for model in self.models)

    @property
    def done(self) -> int:
        """Tasks that need nothing more, the cached ones included."""
        return sum(model.done for model in self.models)

    @property
    def computed(self) -> int:
        """Tasks that were computed for this search."""
        return sum(model.done - model.cached for model in self.models)

    @property
    def content(self) -> tuple[object, ...]:
        """What is worth another line if it changes."""
        return self.state, self.done, self.total, sum(model.running for model in self.models)

    @property
    def news(self) -> object:
        """What is worth another line at once: a new stage, of a single model its front, and what all wait for."""
        if len(self.models) == 1:
            (model,) = self.models
            return self.waiting, model.state, model.stage, model.round, model.front
        return self.waiting, _stages_text(self.models)

    def line(self) -> str:
        """Return it as one line of text."""
        return search_line(self)

    def table(self, per_second: float) -> Table:
        """Return it as a table for a terminal."""
        return search_table(self, per_second)


def search_line(progress: SearchProgress) -> str:
    """Return a search's progress as one line of text: counts, where the models are, and time."""
    parts = [f"{progress.state} {progress.done}/{progress.total} tasks"]
    parts += [f"waiting for the {progress.waiting}"] if progress.waiting else []
    if len(progress.models) == 1:
        (model,) = progress.models
        parts += [stage_text(model)] if model.state in _ACTIVE else []
        parts += [f"front {front_text(model.front)}"] if model.front else []
    else:
        parts.append(_stages_text(progress.models))
        points = sum(len(model.front) for model in progress.models)
        parts += [f"{points} points on {sum(bool(model.front) for model in progress.models)} fronts"] if points else []
    parts += [f"{each.name}: {each.error}" for each in progress.models if each.error]
    parts += [progress.gpus] if progress.gpus else []
    parts.append(human_seconds(progress.seconds))
    if progress.state in _ACTIVE and not progress.waiting and progress.eta_seconds is not None:
        parts.append(f"about {human_seconds(progress.eta_seconds)} left of what is planned")
    return f"search {progress.search}: " + "; ".join(parts)


def search_table(progress: SearchProgress, per_second: float) -> Table:
    """Return a search's progress as a table for a terminal: a row for each model, those that run first."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table(
        title=f"search {progress.search}  {progress.name}  {progress.state}",
        caption=_caption(progress, per_second),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("model", overflow="fold")
    for name in ("stage", ""):
        table.add_column(name)
    for name in ("done", "cached", "running", "queued"):
        table.add_column(name, justify="right")
    table.add_column("front so far", overflow="fold")
    shown = sorted(progress.models, key=lambda model: _ORDER.get(model.state, len(_ORDER)))[:MOST_MODELS]
    for model in shown:
        table.add_row(
            model.name,
            stage_text(model) if model.state in _ACTIVE else model.state,
            ProgressBar(total=max(model.total, 1), completed=model.done, width=16),
            f"{model.done}/{model.total}",
            *(str(count) if count else "" for count in (model.cached, model.running, model.queued)),
            model.error or front_text(model.front),
        )
    if len(progress.models) > len(shown):
        table.add_row(f"and {len(progress.models) - len(shown)} more")
    return table


#: Where the rows of models in a state stand.
_ORDER = {"running": 0, "failed": 1, "queued": 2, "succeeded": 3, "cancelled": 4}


def stage_text(model: ModelProgress) -> str:
    """Return what a model is at: `screening 1/2`."""
    return f"{model.stage} {model.round}/{model.rounds}" if model.stage == "screening" else model.stage


def front_text(front: Sequence[FrontPoint]) -> str:
    """Return a front for people, at most `MOST_POINTS` of it, smallest and largest among them.

    `1.90 MB 36.1 dB, 2.44 MB ~39.9 dB`: a tilde stands before what was measured at few seeds only.
    """
    points = list(front)
    if len(points) > MOST_POINTS:
        stride = (len(points) - 1) / (MOST_POINTS - 1)
        points = [points[round(index * stride)] for index in range(MOST_POINTS)]
    return ", ".join(
        f"{human_bytes(point.bytes, 2)} {'' if point.validated else '~'}{point.psnr_db:.1f} dB" for point in points
    )


def _stages_text(models: Sequence[ModelProgress]) -> str:
    """Return how many models are where: `3 models: sensitivity 1, done 2`."""
    counts: dict[str, int] = {}
    for model in models:
        word = model.stage if model.state in (*_ACTIVE, "succeeded") else model.state
        counts[word] = counts.get(word, 0) + 1
    return f"{len(models)} models: " + ", ".join(f"{word} {count}" for word, count in counts.items())


def _caption(progress: SearchProgress, per_second: float) -> str:
    """Return what holds for all models: tasks, time, pace, what is waited for."""
    caption = f"{progress.done}/{progress.total} tasks planned so far, {human_seconds(progress.seconds)}"
    if progress.state in _ACTIVE:
        caption += f", {per_second:.2f} tasks/s"
        if progress.eta_seconds is not None:
            caption += f", about {human_seconds(progress.eta_seconds)} left of these"
    caption += f"; waiting for the {progress.waiting}" if progress.waiting else ""
    caption += f"; {progress.gpus}" if progress.gpus else ""
    return caption
