"""Looking at searches, running one here, and ending it: what `quantmill search` does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.actions.execution import make_scheduler
from orchestrator.actions.jobs import EXIT_CODES, NOT_FINISHED
from orchestrator.actions.live import Live
from orchestrator.actions.patience import patiently
from orchestrator.actions.search_progress import FrontPoint, ModelProgress, SearchProgress
from orchestrator.db.clock import database_time
from orchestrator.db.rows import SearchCosts, SearchModelRow, SearchPointRow, SearchRow
from orchestrator.db.searches import (
    find_search,
    list_searches,
    search_costs,
    search_models,
    search_points,
    task_counts,
)
from orchestrator.db.waiting import search_waiting
from orchestrator.search.advance import advance
from orchestrator.search.fronts import Measured, front, measured_of
from orchestrator.search.load import spec_from_json
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState
from orchestrator.text import utc_text
from quant_spec.enums import Objective
from quant_spec.search import SearchSpec

#: Metrics of a score that a point shows, by the point's key.
_SHOWN = {"bits_mean": "weight_bits_mean", "bytes": "bytes", "bops": "bops", "psnr_db": "psnr_db"}
_SHOWN |= {"psnr_db_ci95": "psnr_db_ci95", "fd": "fd", "n": "n"}


def run_search(service: Service, search: SearchRow, stop: threading.Event) -> SearchRow:
    """Execute a search here to its end, or until `stop` is set, showing its progress on stderr.

    A search that needs nothing computed starts nothing, Ray included.
    """
    advance(service, search.id)
    row = _look(service, search.id)
    if row.state in ACTIVE_JOBS:
        service.database.patience.stop = stop
        scheduler = make_scheduler(service)
        with Live(lambda: search_progress(service, search.id)):
            scheduler.run(stop=stop, until_search=search.id)
    return patiently(lambda: _look(service, search.id), deadline=time.monotonic() if stop.is_set() else None)


def search_exit_code(row: SearchRow) -> int:
    """Return what the shell is told about a search; of one that has not ended, 101."""
    return EXIT_CODES.get(row.state, NOT_FINISHED)


def show_search(service: Service, prefix: str) -> dict[str, Any]:
    """Return a search's view by its id, a unique beginning of it, or its name."""
    with service.database.session(read_only=True) as session:
        row = find_search(session, prefix)
        models = search_models(session, row.id)
        points = search_points(session, row.id)
        costs = search_costs(session, row.id)
        now = database_time(session)
        waiting = search_waiting(session, row)
    return search_view(row, models, points, costs, now) | {"waiting": waiting}


def search_view(
    row: SearchRow, models: Sequence[SearchModelRow], points: Sequence[SearchPointRow], costs: SearchCosts, now: float
) -> dict[str, Any]:
    """Return a search as `search run` and `search show` show it."""
    spec = spec_from_json(row.spec)
    return {
        "search": row.id,
        "name": row.name,
        "state": row.state.value,
        "models": {
            model.name: points_view(spec, [each for each in points if each.model == model.name], costs)
            for model in models
        },
        "tasks": costs.tasks,
        "seconds": round(max((row.finished_at or now) - row.created_at, 0.0), 3),
        "task_seconds": round(costs.spent_seconds, 3),
        "saved_seconds": round(costs.saved_seconds, 3),
        "errors": {model.name: model.error for model in models if model.error is not None},
        "error": row.error,
        "stages": {model.name: stage_view(model) for model in models},
        "objective": spec.objective.value,
        "budgets": [budget.limits() for budget in spec.budgets],
        "only": row.only,
        "owner": row.owner,
        "priority": row.priority,
        "created_at": utc_text(row.created_at),
        "started_at": utc_text(row.started_at),
        "finished_at": utc_text(row.finished_at),
    }


def stage_view(model: SearchModelRow) -> dict[str, Any]:
    """Return how far a model is, where it started from, and what was predicted for it."""
    parent = None if model.parent is None else {"search": model.parent, "model": model.parent_model}
    proposed = model.proposed or {}
    return {
        "state": model.state.value,
        "stage": model.stage,
        "round": model.round,
        "rounds": model.last_round,
        "parent": parent,
        "predicted_front": proposed.get("front", []),
        "surrogate": proposed.get("surrogate"),
        "job": model.job,
    }


def points_view(spec: SearchSpec, points: Sequence[SearchPointRow], costs: SearchCosts) -> list[dict[str, Any]]:
    """Return a model's points, each with its most exact measurement, and whether it is on the front."""
    on_front = {each.number for each in validated_front(spec.objective, points)}
    return [point_view(point, costs, on_front=point.number in on_front) for point in points]


def point_view(point: SearchPointRow, costs: SearchCosts, *, on_front: bool) -> dict[str, Any]:
    """Return one point; what was not measured is null."""
    metrics = point.metrics or point.screened or {}
    jobs = {point.job, (point.screened or {}).get("job")} - {None}
    return {
        "number": point.number,
        "origin": point.origin,
        "stage": point.stage,
        "round": point.round,
        "budget": point.budget,
        **{key: metrics.get(name) for key, name in _SHOWN.items()},
        "allocation": point.digest,
        "variant": point.allocation["variant"],
        "release": point.release,
        "predicted": point.predicted,
        "screened_psnr_db": (point.screened or {}).get("psnr_db"),
        "dropped": point.dropped,
        "job": point.job,
        "task_seconds": round(sum(cost.seconds for job in jobs if (cost := costs.jobs.get(str(job))) is not None), 3),
        "on_front": on_front,
    }


def validated_front(objective: Objective, points: Sequence[SearchPointRow]) -> list[Measured]:
    """Return the points on a model's front that were measured with the full protocol, by size."""
    return front([each for point in points if (each := measured_of(point.number, objective, point.metrics, None))])


def pareto_view(view: Mapping[str, Any]) -> dict[str, Any]:
    """Return a search's view with only what is on the front, by size."""
    models = {
        name: sorted((point for point in points if point["on_front"]), key=lambda point: int(point["bytes"]))
        for name, points in view["models"].items()
    }
    return {**view, "models": models}


def smallest_models(
    view: Mapping[str, Any], damage: float | None, psnr_db: float | None
) -> dict[str, dict[str, Any] | None]:
    """Return for each model the smallest point of its predicted front within a damage, and of at least a PSNR.

    None where nothing is predicted to reach that.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for model, stage in view["stages"].items():
        good = [
            {"bytes": size, "damage": lost, "psnr_db": decibels}
            for size, lost, decibels in stage["predicted_front"]
            if (damage is None or lost <= damage) and (psnr_db is None or (decibels or -math.inf) >= psnr_db)
        ]
        found[model] = min(good, key=lambda each: int(each["bytes"]), default=None)
    return found


def show_searches(service: Service, limit: int = 50) -> list[dict[str, Any]]:
    """Return the newest searches, newest first."""
    with service.database.session(read_only=True) as session:
        now = database_time(session)
        views = []
        for row in list_searches(session, limit):
            models = search_models(session, row.id)
            points = search_points(session, row.id)
            views.append(
                {
                    "search": row.id,
                    "name": row.name,
                    "state": row.state.value,
                    "owner": row.owner,
                    "models": len(models),
                    "done": sum(model.stage == "done" for model in models),
                    "failed": sum(model.state is JobState.FAILED for model in models),
                    "points": sum(point.metrics is not None for point in points),
                    "releases": sum(point.release is not None for point in points),
                    "seconds": round(max((row.finished_at or now) - row.created_at, 0.0), 3),
                    "created_at": utc_text(row.created_at),
                }
            )
    return views


def search_progress(service: Service, search_id: str) -> SearchProgress:
    """Read a search's progress."""
    with service.database.session(read_only=True) as session:
        row = find_search(session, search_id)
        models = search_models(session, search_id)
        points = search_points(session, search_id)
        counts = task_counts(session, search_id)
        now = database_time(session)
        waiting = search_waiting(session, row)
    objective = spec_from_json(row.spec).objective
    shown = tuple(
        _model_progress(model, [each for each in points if each.model == model.name], counts, objective)
        for model in models
    )
    seconds = max((row.finished_at or now) - row.created_at, 0.0)
    return SearchProgress(row.id, row.name, row.state.value, shown, seconds, waiting=waiting)


def _model_progress(
    model: SearchModelRow,
    points: Sequence[SearchPointRow],
    counts: Mapping[str, Mapping[str, int]],
    objective: Objective,
) -> ModelProgress:
    """Return how far one model is."""
    by_number = {point.number: point for point in points}
    measured = [
        each
        for point in points
        if (each := measured_of(point.number, objective, point.metrics or point.screened or point.measured, None))
    ]
    shown = tuple(
        FrontPoint(
            bytes=each.bytes,
            psnr_db=float(each.metrics["psnr_db"]),
            validated=by_number[each.number].metrics is not None,
            release=by_number[each.number].release,
        )
        for each in front(measured)
    )
    none = dict.fromkeys(("total", "done", "cached", "running", "queued"), 0)
    return ModelProgress(
        name=model.name,
        state=model.state.value,
        stage=model.stage,
        round=model.round,
        rounds=model.last_round,
        **counts.get(model.name, none),
        front=shown,
        error=model.error,
    )


def _look(service: Service, search_id: str) -> SearchRow:
    with service.database.session(read_only=True) as session:
        return find_search(session, search_id)
