"""From a search to what its report shows: its rows, what its jobs took, tables and samples of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import yaml

from orchestrator.actions.diff import release_bits
from orchestrator.actions.searches import validated_front
from orchestrator.actions.sensitivity import layer_order, read_sensitivities, read_tables
from orchestrator.db.clock import database_time
from orchestrator.db.jobs import find_job, list_tasks
from orchestrator.db.registry import find_model
from orchestrator.db.rows import ModelRow, SearchJobCost, SearchModelRow, SearchPointRow
from orchestrator.db.searches import find_search, search_costs, search_models, search_points, tables_read
from orchestrator.db.session import Session
from orchestrator.report.collect import read_strips
from orchestrator.report.images import Strips
from orchestrator.report.render import protocol_line
from orchestrator.report.search_data import ModelReport, PointRow, SearchReportData, StageCost, Surrogate
from orchestrator.search.fronts import front, measured_of, prediction_error
from orchestrator.search.load import spec_from_json
from orchestrator.service import Service
from orchestrator.text import utc_text
from quant_spec.allocation import Allocation
from quant_spec.keys import canonical_json
from quant_spec.search import SearchSpec
from workers.storage.store import Store

#: Points of a report whose samples it shows, and the pixels of each image's longer side, at most.
MOST_GRIDS, MOST_PIXELS = 300, 96
#: What a job belongs to that measures no point.
_OTHER = "sensitivity and proposals"


@dataclass(frozen=True, slots=True)
class _Found:
    """One model's rows; `artifacts` are the digests of what was packed, by point, of those measured in full."""

    row: SearchModelRow
    model: ModelRow
    points: Sequence[SearchPointRow]
    tables: Mapping[str, Sequence[str]]
    artifacts: Mapping[int, str]


def collect_search(service: Service, prefix: str) -> SearchReportData:
    """Gather what the report of a search shows, ended or not.

    Parameters
    ----------
    service
        Where the search is.
    prefix
        Of its id, or its name.

    Raises
    ------
    NotFoundError
        If there is no such search, or bytes that it needs are lost.
    """
    with service.database.session(read_only=True) as session:
        row = find_search(session, prefix)
        now = database_time(session)
        costs = tuple(search_costs(session, row.id).jobs.values())
        found = [_find(session, row.id, model) for model in search_models(session, row.id)]
    spec = spec_from_json(row.spec)
    grids = _grids(service, [point for each in found for point in each.points])
    measured = [point.metrics for each in found for point in each.points if point.metrics]
    return SearchReportData(
        search=row.id,
        name=row.name,
        description=spec.description,
        owner=row.owner,
        state=row.state.value,
        started=utc_text(row.created_at) or "",
        finished=utc_text(row.finished_at),
        wall_seconds=max((row.finished_at or now) - row.created_at, 0.0),
        recipe=spec.recipe,
        objective=spec.objective.value,
        budgets=tuple(budget.text() for budget in spec.budgets),
        byte_budgets=tuple(budget.bytes for budget in spec.budgets if budget.bytes is not None),
        protocol=protocol_line(measured[0]) if measured else "",
        screening=_screening_text(spec),
        spec_yaml=yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        models=tuple(_model(service.store, each, spec, costs, grids) for each in found),
    )


def _find(session: Session, search_id: str, model: SearchModelRow) -> _Found:
    """Read one model's rows."""
    points = search_points(session, search_id, model.name)
    jobs = {point.number: find_job(session, point.job) for point in points if point.metrics and point.job}
    return _Found(
        row=model,
        model=find_model(session, model.name),
        points=points,
        tables=tables_read(session, search_id, model.name) or {},
        artifacts={number: job.digest for number, job in jobs.items() if job.digest is not None},
    )


def _model(
    store: Store,
    found: _Found,
    spec: SearchSpec,
    costs: Sequence[SearchJobCost],
    grids: Mapping[str, Strips],
) -> ModelReport:
    """Return one model's part of the report; of several variants' tables the base recipe's, which comes first."""
    row, proposed = found.row, found.row.proposed or {}
    by_job = {cost.job: cost for cost in costs if cost.model == row.name}
    layers = layer_order(found.model)
    surrogate = proposed.get("surrogate") or {}
    on_front = _on_front(spec, found.points)
    packed = {number: release_bits(store, digest) for number, digest in found.artifacts.items() if number in on_front}
    table = next(iter(read_tables(store, dict(list(found.tables.items())[:1])).values()), None)
    return ModelReport(
        name=row.name,
        digest=row.digest,
        state=row.state.value,
        stage=row.stage,
        layers=tuple(layers),
        points=tuple(
            replace(
                _point(each, by_job, grids),
                on_front=each.number in on_front,
                packed=packed.get(each.number, {}),
            )
            for each in found.points
        ),
        sensitivities=None if table is None else read_sensitivities(table, [name for name, _ in layers]),
        front=tuple(
            (float(size), float(damage), float(psnr_db))
            for size, damage, psnr_db in proposed.get("front", ())
            if psnr_db is not None
        ),
        surrogate=Surrogate(surrogate["n"], surrogate.get("residual_db")) if "n" in surrogate else None,
        costs=_stage_costs(found.points, by_job),
        parent=None if row.parent is None else f"{row.parent_model} (search {row.parent})",
        error=row.error,
    )


def _on_front(spec: SearchSpec, points: Sequence[SearchPointRow]) -> set[int]:
    """Return the numbers of the points on the front of those measured in full; while there are none, of the others."""
    validated = {each.number for each in validated_front(spec.objective, points)}
    screened = [measured_of(each.number, spec.objective, each.screened or each.measured, None) for each in points]
    return validated or {each.number for each in front([each for each in screened if each is not None])}


def _point(row: SearchPointRow, by_job: Mapping[str, SearchJobCost], grids: Mapping[str, Strips]) -> PointRow:
    """Return one point with its most exact measurement."""
    metrics = row.metrics or row.screened or row.measured or {}
    jobs = {str(job) for job in (row.job, (row.screened or {}).get("job")) if job is not None}
    costs = [by_job[job] for job in sorted(jobs & set(by_job))]
    return PointRow(
        number=row.number,
        origin=row.origin,
        stage="final" if row.metrics else "screening",
        round=row.round,
        budget=None if row.budget is None else row.budget + 1,
        allocation=Allocation.model_validate_json(canonical_json(row.allocation)),
        digest=row.digest,
        predicted=row.predicted or {},
        bytes=metrics.get("bytes"),
        bits_mean=metrics.get("weight_bits_mean"),
        bops=metrics.get("bops"),
        psnr_db=metrics.get("psnr_db"),
        psnr_db_ci95=metrics.get("psnr_db_ci95"),
        fd=metrics.get("fd"),
        error=prediction_error(metrics),
        n=metrics.get("n"),
        dropped=row.dropped,
        release=row.release,
        job=row.job,
        seconds=sum(cost.seconds for cost in costs) if costs else None,
        saved_seconds=sum(cost.saved_seconds for cost in costs) if costs else None,
        grid=grids.get(row.job or ""),
    )


def _stage_costs(points: Sequence[SearchPointRow], by_job: Mapping[str, SearchJobCost]) -> tuple[StageCost, ...]:
    """Sum jobs up by stage: what measured no point is sensitivities and proposals."""
    stages = dict.fromkeys(by_job, _OTHER)
    for point in points:
        if point.job in stages:
            stages[point.job] = point.stage
        if (screened := (point.screened or {}).get("job")) in stages:
            stages[screened] = "screening"
    found = []
    for stage in dict.fromkeys((_OTHER, "screening", "final")):
        costs = [by_job[job] for job, of in stages.items() if of == stage]
        if costs:
            found.append(
                StageCost(
                    stage,
                    sum(cost.tasks for cost in costs),
                    sum(cost.cached for cost in costs),
                    sum(cost.seconds for cost in costs),
                    sum(cost.saved_seconds for cost in costs),
                )
            )
    return tuple(found)


def _grids(service: Service, points: Sequence[SearchPointRow]) -> dict[str, Strips]:
    """Draw samples of points that were measured in full, by job: releases and the front first, up to `MOST_GRIDS`."""
    wanted = [point for point in points if point.metrics is not None and point.job is not None]
    wanted.sort(key=lambda point: (point.release is None, point.dropped is not None))
    jobs = [point.job for point in wanted[:MOST_GRIDS] if point.job is not None]
    with service.database.session(read_only=True) as session:
        tasks = {job: list_tasks(session, job, kind="score") for job in jobs}
    strips = {job: read_strips(service.store, scores, rows=1, most=MOST_PIXELS) for job, scores in tasks.items()}
    return {job: drawn[0] for job, drawn in strips.items() if drawn}


def _screening_text(spec: SearchSpec) -> str:
    """Return what candidates were measured with."""
    screening = spec.screening
    if not screening.seeds:
        return ""
    last = screening.first_seed + screening.seeds - 1
    return f"Candidates were screened with seeds {screening.first_seed} to {last}."
