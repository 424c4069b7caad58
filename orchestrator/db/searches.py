"""Searches: making, advancing, ending and looking at them.

Who changes a search holds `lock_enqueue`, so that steps of one search, and the jobs that they queue, come one after the
other, whoever takes them.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import case, func, insert, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.job_ends import end_jobs
from orchestrator.db.models import Job, JobTask, Result, Search, SearchModel, SearchPoint, Task, in_states
from orchestrator.db.releases import publish
from orchestrator.db.rows import SearchCosts, SearchJobCost, SearchModelRow, SearchPointRow, SearchRow
from orchestrator.db.session import lock_enqueue, lock_graph, notify_others
from orchestrator.db.statements import batches
from orchestrator.errors import NotFoundError
from orchestrator.states import ACTIVE_JOBS, JobEvent, JobState, TaskState
from quant_spec.errors import InvalidInputError

#: The kind of task that proposes points, and reads the tables of sensitivities.
PROPOSE_KIND = "propose"

_PLAIN = {"synchronize_session": False}


def create_search(session: Session, values: Mapping[str, Any]) -> str:
    """Make a search without models; return its id, 12 random hexadecimal digits.

    Parameters
    ----------
    values
        Of the columns name, owner, priority, only, spec, recipes, latency and digest.
    """
    lock_enqueue(session)
    search_id = secrets.token_hex(6)
    session.execute(
        insert(Search).values(id=search_id, state=JobState.QUEUED.value, created_at=epoch_seconds(), **values)
    )
    return search_id


def add_search_models(session: Session, search_id: str, models: Sequence[Mapping[str, Any]]) -> None:
    """Add models (model_name, model_digest, shape_digest, last_round) to a search, behind those it has."""
    first = session.scalar(select(func.count()).where(SearchModel.search_id == search_id)) or 0
    fresh = {"state": JobState.QUEUED.value, "stage": "sensitivity", "round": 0}
    for place, values in enumerate(models):
        session.execute(insert(SearchModel).values(search_id=search_id, position=first + place, **fresh, **values))


def find_search(session: Session, prefix: str) -> SearchRow:
    """Return the search whose id begins with these digits, or the newest of that name.

    Raises
    ------
    NotFoundError
        If there is none.
    InvalidInputError
        If the digits fit several.
    """
    by_id = select(Search).where(Search.id.startswith(prefix, autoescape=True)).order_by(Search.id).limit(2)
    by_name = select(Search).where(Search.name == prefix).order_by(Search.created_at.desc()).limit(1)
    rows = session.scalars(by_id).all() or session.scalars(by_name).all()
    if not rows or not prefix:
        raise NotFoundError(f"search: got {prefix!r}, wanted one of search ls")
    if len(rows) > 1:
        raise InvalidInputError(f"search: got {prefix!r}, which fits several ({rows[0].id}, ...); wanted more digits")
    return _search_row(rows[0])


def find_open_search(session: Session, digest: str) -> SearchRow | None:
    """Return the newest search of a digest that has not ended; None if there is none."""
    statement = select(Search).where(in_states(Search.state, ACTIVE_JOBS), Search.digest == digest)
    row = session.scalars(statement.order_by(Search.created_at.desc()).limit(1)).first()
    return None if row is None else _search_row(row)


def list_searches(session: Session, limit: int = 100) -> list[SearchRow]:
    """Return searches, newest first."""
    return [_search_row(row) for row in session.scalars(select(Search).order_by(Search.created_at.desc()).limit(limit))]


def open_searches(session: Session) -> list[str]:
    """Return the ids of the searches that have not ended, by priority, then oldest first."""
    statement = select(Search.id).where(in_states(Search.state, ACTIVE_JOBS))
    return list(session.scalars(statement.order_by(Search.priority.desc(), Search.created_at)))


def active_jobs(session: Session, searches: Collection[str]) -> dict[str, int]:
    """Return how many jobs of each search have not ended."""
    statement = (
        select(Job.search_id, func.count())
        .where(Job.search_id.in_(searches), in_states(Job.state, ACTIVE_JOBS))
        .group_by(Job.search_id)
    )
    found = {row[0]: row[1] for row in session.execute(statement)}
    return {search: found.get(search, 0) for search in searches}


def search_models(session: Session, search_id: str) -> list[SearchModelRow]:
    """Return a search's models in order."""
    statement = select(SearchModel).where(SearchModel.search_id == search_id).order_by(SearchModel.position)
    return [_model_row(row) for row in session.scalars(statement)]


def search_points(session: Session, search_id: str, model: str | None = None) -> list[SearchPointRow]:
    """Return a search's points, all or one model's, each with the state of the job that measures it."""
    statement = (
        select(SearchPoint, Job.state, Job.error, Job.metrics)
        .outerjoin(Job, Job.id == SearchPoint.job_id)
        .where(SearchPoint.search_id == search_id)
        .order_by(SearchPoint.model_name, SearchPoint.number)
    )
    if model is not None:
        statement = statement.where(SearchPoint.model_name == model)
    return [_point_row(*row) for row in session.execute(statement)]


def find_parents(
    session: Session, shape_digest: str, *, but_model: str, but_digest: str, search: str | None = None
) -> list[tuple[str, str]]:
    """Return (search, model) of models of the same architecture that a search has gone through, the newest first.

    Parameters
    ----------
    but_model
        Digest of a model that is not meant.
    but_digest
        Digest of searches that are not meant: what is asked for again must start from where it started.
    search
        If given, only this one.
    """
    statement = (
        select(SearchModel.search_id, SearchModel.model_name)
        .join(Search, Search.id == SearchModel.search_id)
        .where(SearchModel.shape_digest == shape_digest, SearchModel.stage == "done", Search.only.is_(None))
        .where(SearchModel.model_digest != but_model, Search.digest != but_digest)
        .order_by(Search.created_at.desc(), SearchModel.position)
    )
    if search is not None:
        statement = statement.where(SearchModel.search_id == search)
    return [(row.search_id, row.model_name) for row in session.execute(statement)]


def earlier_parent(session: Session, digest: str, model_name: str) -> tuple[str | None, str | None] | None:
    """Return what the newest finished search of a digest started a model from; None if there is no such search."""
    statement = (
        select(SearchModel.parent, SearchModel.parent_model)
        .join(Search, Search.id == SearchModel.search_id)
        .where(Search.digest == digest, SearchModel.model_name == model_name, SearchModel.stage == "done")
        .order_by(Search.created_at.desc())
        .limit(1)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else (row.parent, row.parent_model)


def update_search(session: Session, search_id: str, **values: Any) -> None:
    """Change columns of a search."""
    session.execute(update(Search).where(Search.id == search_id).values(**values), execution_options=_PLAIN)


def update_search_model(session: Session, search_id: str, model: str, **values: Any) -> None:
    """Change columns of a model of a search."""
    where = (SearchModel.search_id == search_id, SearchModel.model_name == model)
    session.execute(update(SearchModel).where(*where).values(**values), execution_options=_PLAIN)


def update_points(session: Session, search_id: str, model: str, numbers: Collection[int], **values: Any) -> None:
    """Change columns of points of a model."""
    where = (SearchPoint.search_id == search_id, SearchPoint.model_name == model)
    for batch in batches(numbers):
        statement = update(SearchPoint).where(*where, SearchPoint.number.in_(batch)).values(**values)
        session.execute(statement, execution_options=_PLAIN)


def add_points(session: Session, search_id: str, model: str, points: Iterable[Mapping[str, Any]]) -> int:
    """Add points (round, stage, origin, budget, allocation, digest, predicted) whose allocations the model has not yet.

    Returns
    -------
    int
        How many were added.
    """
    where = (SearchPoint.search_id == search_id, SearchPoint.model_name == model)
    known = set(session.scalars(select(SearchPoint.digest).where(*where)))
    number = session.scalar(select(func.coalesce(func.max(SearchPoint.number), 0)).where(*where)) or 0
    added = 0
    for values in points:
        if values["digest"] in known:
            continue
        known.add(values["digest"])
        added += 1
        session.execute(
            insert(SearchPoint).values(search_id=search_id, model_name=model, number=number + added, **values)
        )
    return added


def end_search(session: Session, search_id: str, state: JobState, error: str | None = None) -> None:
    """End a search that is open."""
    where = (Search.id == search_id, in_states(Search.state, ACTIVE_JOBS))
    values = {"state": state.value, "error": error, "finished_at": epoch_seconds()}
    session.execute(update(Search).where(*where).values(**values), execution_options=_PLAIN)
    notify_others(session)


def cancel_search(session: Session, search_id: str) -> bool:
    """Cancel a search, its jobs, and the tasks that nobody else wants; False if it had ended already."""
    lock_enqueue(session)
    lock_graph(session)
    if find_search(session, search_id).state not in ACTIVE_JOBS:
        return False
    cancel_search_jobs(session, search_id)
    left = (SearchModel.search_id == search_id, in_states(SearchModel.state, ACTIVE_JOBS))
    session.execute(update(SearchModel).where(*left).values(state=JobState.CANCELLED.value), execution_options=_PLAIN)
    end_search(session, search_id, JobState.CANCELLED)
    return True


def cancel_search_jobs(session: Session, search_id: str, model: str | None = None) -> None:
    """Cancel the jobs of a search that have not ended, all or those of one model; call under `lock_graph`."""
    statement = select(Job.id).where(Job.search_id == search_id, in_states(Job.state, ACTIVE_JOBS))
    if model is not None:
        statement = statement.where(Job.model_name == model)
    end_jobs(session, sorted(session.scalars(statement)), JobEvent.CANCEL, None)


def search_costs(session: Session, search_id: str) -> SearchCosts:
    """Return what a search's jobs took: tasks by state, and what each job spent and saved.

    A task that several jobs want is spent by the first of them. What a job uses without computing it is saved.
    """
    statement = (
        select(Job.id, Job.model_name, JobTask.task_id, JobTask.cached, Task.state, Result.seconds)
        .join(JobTask, JobTask.job_id == Job.id)
        .join(Task, Task.id == JobTask.task_id)
        .outerjoin(Result, Result.key == Task.key)
        .where(Job.search_id == search_id)
        .order_by(Job.created_at, Job.id)
    )
    tasks: dict[str, str] = {}
    computed: set[str] = set()
    jobs: dict[str, SearchJobCost] = {}
    for row in session.execute(statement):
        tasks[row.task_id] = row.state
        cost = jobs.get(row.id, SearchJobCost(row.id, row.model_name, 0, 0, 0.0, 0.0))
        seconds = row.seconds if row.seconds is not None and row.state == TaskState.SUCCEEDED.value else 0.0
        own = not row.cached and row.task_id not in computed
        if own:
            computed.add(row.task_id)
        jobs[row.id] = replace(
            cost,
            tasks=cost.tasks + 1,
            cached=cost.cached + (not own),
            seconds=cost.seconds + (seconds if own else 0.0),
            saved_seconds=cost.saved_seconds + (0.0 if own else seconds),
        )
    states = list(tasks.values())
    counts = {
        "total": len(tasks),
        "cached": len(tasks) - len(computed),
        "succeeded": states.count(TaskState.SUCCEEDED.value),
        "failed": states.count(TaskState.FAILED.value),
        "running": states.count(TaskState.RUNNING.value),
        "queued": states.count(TaskState.QUEUED.value) + states.count(TaskState.BLOCKED.value),
    }
    return SearchCosts(counts, jobs)


def task_counts(session: Session, search_id: str) -> dict[str, dict[str, int]]:
    """Return how many distinct tasks each model's jobs have: total, done, cached (of those), running and queued."""
    computed = func.max(case((JobTask.cached, 0), else_=1)).label("computed")
    own = (
        select(Job.model_name, Task.state, computed)
        .join(JobTask, JobTask.job_id == Job.id)
        .join(Task, Task.id == JobTask.task_id)
        .where(Job.search_id == search_id)
        .group_by(Job.model_name, Task.id, Task.state)
        .subquery()
    )
    statement = select(own.c.model_name, own.c.state, own.c.computed, func.count()).group_by(
        own.c.model_name, own.c.state, own.c.computed
    )
    found: dict[str, dict[str, int]] = {}
    for model, state, was_computed, count in session.execute(statement):
        counts = found.setdefault(model, dict.fromkeys(("total", "done", "cached", "running", "queued"), 0))
        counts["total"] += count
        counts["done"] += count if state == TaskState.SUCCEEDED else 0
        counts["cached"] += count if state == TaskState.SUCCEEDED and not was_computed else 0
        counts["running"] += count if state == TaskState.RUNNING else 0
        counts["queued"] += count if state in (TaskState.QUEUED, TaskState.BLOCKED) else 0
    return found


def model_spent(session: Session, search_id: str, model: str) -> tuple[int, float]:
    """Return how many tasks a model's jobs of a search have had computed, and their seconds."""
    tasks = (
        select(JobTask.task_id)
        .join(Job, Job.id == JobTask.job_id)
        .where(Job.search_id == search_id, Job.model_name == model, ~JobTask.cached)
        .distinct()
    )
    statement = (
        select(func.count(), func.coalesce(func.sum(Result.seconds), 0.0))
        .select_from(Task)
        .outerjoin(Result, Result.key == Task.key)
        .where(Task.id.in_(tasks))
    )
    count, seconds = session.execute(statement).one()
    return count, float(seconds)


def target_result(session: Session, job_id: str) -> tuple[dict[str, str], dict[str, Any]] | None:
    """Return the outputs and metrics of a job's last task; None if it is not recorded."""
    statement = (
        select(Result.outputs, Result.metrics)
        .join(Task, Task.key == Result.key)
        .join(Job, Job.target_task == Task.id)
        .where(Job.id == job_id)
    )
    row = session.execute(statement).one_or_none()
    return None if row is None else (row.outputs, row.metrics)


def tables_read(session: Session, search_id: str, model: str) -> dict[str, list[str]] | None:
    """Return the digests of the tables of sensitivities that a model's proposals were made from, by variant."""
    statement = (
        select(Task.params, Task.inputs)
        .join(JobTask, JobTask.task_id == Task.id)
        .join(Job, Job.id == JobTask.job_id)
        .where(Job.search_id == search_id, Job.model_name == model, Task.kind == PROPOSE_KIND)
        .where(in_states(Task.state, [TaskState.SUCCEEDED]))
        .order_by(Task.seq)
        .limit(1)
    )
    row = session.execute(statement).one_or_none()
    if row is None:
        return None
    found: dict[str, list[str]] = {}
    for variant, digest in zip(row.params["variants"], row.inputs["tables"], strict=True):
        found.setdefault(variant, []).append(digest)
    return found


def publish_point(session: Session, job_id: str, name: str) -> str | None:
    """Publish what a job has made under a name; return "name@N", or None if the job has made no release.

    Call under `lock_graph`.
    """
    made = target_result(session, job_id)
    if made is None or "artifact" not in made[0]:
        return None
    outputs, metrics = made
    size = int(metrics["artifact_bytes"])
    ref = publish(session, name, outputs["artifact"], size, job=job_id, metrics=metrics["metrics"])
    published = update(Job).where(Job.id == job_id).values(release=ref, release_name=name)
    session.execute(published, execution_options=_PLAIN)
    return ref


def _search_row(row: Search) -> SearchRow:
    return SearchRow(
        id=row.id,
        name=row.name,
        owner=row.owner,
        state=JobState(row.state),
        priority=row.priority,
        only=row.only,
        spec=row.spec,
        recipes=row.recipes,
        latency=row.latency,
        digest=row.digest,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=row.error,
    )


def _model_row(row: SearchModel) -> SearchModelRow:
    return SearchModelRow(
        search=row.search_id,
        name=row.model_name,
        digest=row.model_digest,
        shape_digest=row.shape_digest,
        state=JobState(row.state),
        stage=row.stage,
        round=row.round,
        last_round=row.last_round,
        job=row.job_id,
        parent=row.parent,
        parent_model=row.parent_model,
        proposed=row.proposed,
        error=row.error,
    )


def _point_row(
    row: SearchPoint, job_state: str | None, job_error: str | None, measured: dict[str, Any] | None
) -> SearchPointRow:
    return SearchPointRow(
        number=row.number,
        model=row.model_name,
        round=row.round,
        stage=row.stage,
        origin=row.origin,
        budget=row.budget,
        allocation=row.allocation,
        digest=row.digest,
        job=row.job_id,
        job_state=None if job_state is None else JobState(job_state),
        job_error=job_error,
        measured=measured,
        predicted=row.predicted,
        screened=row.screened,
        metrics=row.metrics,
        dropped=row.dropped,
        release=row.release,
    )
