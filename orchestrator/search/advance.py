"""The loop of a search: look at what is recorded, take the next step, queue the jobs that it needs.

Each model goes through `sensitivity` (a job that ends in proposals), `screening` (rounds of candidates at few seeds,
each proposed from what the earlier ones measured), `final` (the best, and what they are compared with, with the
recipe's whole evaluation) and `done`. All that is known lies in the rows, so any process may take the next step at any
time: a step is one transaction under `lock_enqueue`, and looks again at the rows that it was decided on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.db.clock import database_time
from orchestrator.db.jobs import find_job
from orchestrator.db.registry import find_model
from orchestrator.db.remake import withdraw_lost
from orchestrator.db.rows import JobRow, ModelRow, SearchModelRow, SearchPointRow, SearchRow
from orchestrator.db.searches import (
    active_jobs,
    add_points,
    cancel_search_jobs,
    end_search,
    find_search,
    model_spent,
    open_searches,
    publish_point,
    search_models,
    search_points,
    target_result,
    update_points,
    update_search,
    update_search_model,
)
from orchestrator.db.session import Session, lock_enqueue, lock_graph
from orchestrator.errors import DatabaseError, SearchError
from orchestrator.planning.model import ModelInfo
from orchestrator.search.baselines import uniform_points
from orchestrator.search.candidates import candidate, recipes_of, screened
from orchestrator.search.fixed import fixed_layers
from orchestrator.search.fronts import (
    Measured,
    best_within,
    choose,
    dominators,
    front,
    measured_of,
    prediction_error,
    spread,
    why_dominated,
)
from orchestrator.search.jobs import plan_candidate, queue_job
from orchestrator.search.proposals import Proposals, read_proposals
from orchestrator.search.proposing import plan_proposals
from orchestrator.search.warm import find_parent, parent_tables, warm_points
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState
from quant_spec.allocation import Allocation
from quant_spec.errors import QuantServiceError
from quant_spec.keys import canonical_json
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT, SearchSpec
from workers.errors import BlobLostError, StoreError
from workers.storage.names import check_name

log = logging.getLogger(__name__)

#: Candidate jobs of one search that are queued at once, at most; models take turns.
IN_FLIGHT = 64
# How often an orchestrator looks whether there is a step to take: while a search is open, and while none is; and how
# often at each search, whatever its jobs are.
_OPEN_SECONDS, _CLOSED_SECONDS, _LOOK_SECONDS = 0.1, 1.0, 2.0
#: Characters of a release's name.
_NAME_LENGTH = 128


@dataclass(frozen=True, slots=True)
class _Search:
    """A search's row, read."""

    row: SearchRow
    spec: SearchSpec
    recipes: Mapping[str, Recipe]

    @property
    def id(self) -> str:
        """Its id."""
        return self.row.id


class Steps:
    """Takes the steps of all open searches, whenever one can be taken; for orchestrators, between claims."""

    def __init__(self, service: Service) -> None:
        """Work on a service's searches."""
        self._service = service
        self._seen: dict[str, tuple[int, float]] = {}

    def __call__(self) -> float:
        """Take what steps can be taken; return in how many seconds to look again."""
        with self._service.database.session(read_only=True) as session:
            ids = open_searches(session)
            active = active_jobs(session, ids) if ids else {}
        now = time.monotonic()
        for search in ids:
            count, looked = self._seen.get(search, (-1, 0.0))
            # Steps follow the ends of jobs; another orchestrator's steps are seen a little later.
            if active[search] != count or now > looked + _LOOK_SECONDS:
                try:
                    advance(self._service, search)
                except StoreError as error:
                    # Whatever is with its bytes, other searches go on.
                    log.warning("search %s waits for the store: %s", search, error)
                with self._service.database.session(read_only=True) as session:
                    self._seen[search] = (active_jobs(session, [search])[search], now)
        self._seen = {search: seen for search, seen in self._seen.items() if search in active}
        return _OPEN_SECONDS if ids else _CLOSED_SECONDS


def advance(service: Service, search_id: str) -> bool:
    """Take all steps of a search that can be taken now; say whether there were any.

    Raises
    ------
    DatabaseError
        If the database does not answer; what was done so far stands.
    """
    moved = False
    while _advance_once(service, search_id):
        moved = True
    return moved


def _advance_once(service: Service, search_id: str) -> bool:
    """Take one step of each model that can take one."""
    with service.database.session(read_only=True) as session:
        row = find_search(session, search_id)
        if row.state not in ACTIVE_JOBS:
            return False
        models = search_models(session, search_id)
        due = [model for model in models if _is_due(session, row, model, models)]
    search = _Search(row, SearchSpec.model_validate_json(canonical_json(row.spec)), recipes_of(row.recipes))
    moved = False
    for model in due:
        moved = _step(service, search, model) or moved
    moved = _fill(service, search) or moved
    return _finish(service, search) or moved


def _is_due(session: Session, search: SearchRow, model: SearchModelRow, models: Sequence[SearchModelRow]) -> bool:
    """Say whether a model's next step can be taken: what it waits for has ended."""
    if model.state not in ACTIVE_JOBS:
        return False
    if model.job is not None:
        return find_job(session, model.job).state not in ACTIVE_JOBS
    if model.stage == "sensitivity":
        return not _waits_for_leader(search, model, models)
    points = [each for each in search_points(session, search.id, model.name) if _in_hand(each, model)]
    return all(each.job is not None and each.job_state not in ACTIVE_JOBS for each in points)


def _in_hand(point: SearchPointRow, model: SearchModelRow) -> bool:
    """Say whether a point belongs to the stage that its model is in, and is not dropped."""
    if point.dropped is not None or point.stage != model.stage:
        return False
    return point.round == model.round if model.stage == "screening" else point.metrics is None


def _waits_for_leader(search: SearchRow, model: SearchModelRow, models: Sequence[SearchModelRow]) -> bool:
    """Say whether an earlier model of the same architecture is still searched, from whose front this one starts."""
    if search.spec.get("warm_start") is not True or search.only is not None:
        return False
    leader = next(each for each in models if each.shape_digest == model.shape_digest)
    return leader.name != model.name and leader.state in ACTIVE_JOBS


def _step(service: Service, search: _Search, model: SearchModelRow) -> bool:
    """Take one model's next step; what goes wrong ends that model's search and no other's."""
    try:
        proposals = None
        if model.job is not None:
            proposals = _read(service, model.job)
        with service.database.session() as session:
            lock_enqueue(session)
            if not _is_unchanged(session, search, model):
                return False
            step = _Step(session, search, model)
            step.take(proposals)
            return True
    except BlobLostError as error:
        return _make_again(service, search, model, error.digest)
    except (DatabaseError, StoreError):
        raise
    except QuantServiceError as error:
        return _fail(service, search, model, " ".join(str(error).split()))
    except Exception as error:
        log.exception("search %s, model %s: a step failed", search.id, model.name)
        return _fail(service, search, model, f"this is a fault of Quantmill: {type(error).__name__}: {error}")


def _is_unchanged(session: Session, search: _Search, model: SearchModelRow) -> bool:
    """Say whether a model is where it was when its step was decided on, and its search still open."""
    now = {each.name: each for each in search_models(session, search.id)}.get(model.name)
    open_still = find_search(session, search.id).state in ACTIVE_JOBS
    return (
        open_still
        and now is not None
        and (now.state, now.stage, now.round, now.last_round, now.job)
        == ((model.state, model.stage, model.round, model.last_round, model.job))
    )


def _read(service: Service, job_id: str) -> Proposals | JobRow:
    """Return what a job of proposals gave, or the job if it gave none."""
    with service.database.session(read_only=True) as session:
        job = find_job(session, job_id)
        made = target_result(session, job_id) if job.state is JobState.SUCCEEDED else None
    return job if made is None else read_proposals(service.store, *made)


def _make_again(service: Service, search: _Search, model: SearchModelRow, lost: str) -> bool:
    """Withdraw proposals whose bytes are lost, so that the model's next step asks for them again."""
    with service.database.session() as session:
        lock_enqueue(session)
        lock_graph(session)
        if model.job is None or not _is_unchanged(session, search, model):
            return False
        withdraw_lost(session, str(find_job(session, model.job).target_task), [lost], lost)
        update_search_model(session, search.id, model.name, job_id=None)
    log.warning("search %s, model %s: proposals are made again, as their bytes are lost", search.id, model.name)
    return True


def _fail(service: Service, search: _Search, model: SearchModelRow, error: str) -> bool:
    """End one model's search."""
    with service.database.session() as session:
        lock_enqueue(session)
        if not _is_unchanged(session, search, model):
            return False
        lock_graph(session)
        cancel_search_jobs(session, search.id, model.name)
        update_search_model(session, search.id, model.name, state=JobState.FAILED.value, error=error)
    log.warning("search %s: model %s failed: %s", search.id, model.name, error)
    return True


class _Step:
    """One model's next step, in a transaction that holds `lock_enqueue`."""

    def __init__(self, session: Session, search: _Search, model: SearchModelRow) -> None:
        self.session, self.search, self.model, self.spec = session, search, model, search.spec
        self.row: ModelRow = find_model(session, model.name)
        self.points = search_points(session, search.id, model.name)

    def take(self, given: Proposals | JobRow | None) -> None:
        """Do what the model's stage asks for."""
        if isinstance(given, JobRow):
            raise SearchError(given.error or f"job {given.id}, which was to propose points, was {given.state}")
        if given is not None:
            self.add_candidates(given)
        elif self.model.stage == "sensitivity":
            self.propose()
        elif self.model.stage == "screening":
            self.end_round()
        else:
            self.conclude()

    def move(self, **values: Any) -> None:
        """Change the model's row; it has begun by now."""
        values = {"state": JobState.RUNNING.value} | values
        update_search_model(self.session, self.search.id, self.model.name, **values)

    def change(self, numbers: Sequence[int], **values: Any) -> None:
        """Change the model's points."""
        update_points(self.session, self.search.id, self.model.name, numbers, **values)

    def propose(self) -> None:
        """Queue the job that ends in proposals: at first with all sensitivities, later from what was measured."""
        values: dict[str, Any] = {}
        parent = (self.model.parent, self.model.parent_model)
        if self.model.round == 0 and self.search.row.only is None:
            parent = find_parent(self.session, self.search.row, self.spec, self.model)
            values = {"parent": parent[0], "parent_model": parent[1]}
            if parent[0] is not None:
                values["last_round"] = max(1, self.model.last_round - 1)
        tables = parent_tables(self.session, self.search.row, *parent)
        latency = self.search.row.latency
        job = plan_proposals(self.row, self.spec, self.search.recipes, self.measured_json(), latency, tables)
        self.move(job_id=queue_job(self.session, self.search.row, self.row, job), **values)

    def measured_json(self) -> list[dict[str, Any]]:
        """Return what was measured so far, as proposals are told it: of each point its most exact measurement."""
        told = []
        for point in self.points:
            metrics = point.metrics or point.screened
            if metrics is None or point.allocation["variant"] not in self.spec.space.variant_names():
                continue
            told.append(
                {
                    "allocation": Allocation.model_validate_json(canonical_json(point.allocation)).to_json(),
                    "psnr_db": metrics.get("psnr_db"),
                    "fd": metrics.get("fd"),
                    "error": prediction_error(metrics),
                    "bytes": metrics["bytes"],
                }
            )
        return told

    def add_candidates(self, proposals: Proposals) -> None:
        """Make points of what was proposed; without candidates to screen, go on to the final stage."""
        if proposals.infeasible:
            raise SearchError(proposals.infeasible_text(self.spec))
        proposed = proposals.summary()
        if self.search.row.only is not None:
            self.move(job_id=None, proposed=proposed, stage="done", state=JobState.SUCCEEDED.value)
            return
        number = self.model.round + 1
        wanted = []
        if self.model.round == 0 and self.model.parent is not None:
            parent = (self.model.parent, str(self.model.parent_model))
            wanted += warm_points(self.session, *parent, self.spec.effort.candidates)
        wanted += proposals.points
        screen = self.spec.screening.seeds > 0
        limit = self.candidates_left() if screen else self.spec.points
        values = [
            {
                "round": number,
                "stage": "screening" if screen else "final",
                "origin": each.origin,
                "budget": each.budget,
                "allocation": each.allocation.model_dump(mode="json"),
                "digest": each.allocation.digest,
                "predicted": each.predicted,
            }
            for each in wanted
        ]
        known = {point.digest for point in self.points}
        fresh = [each for each in values if each["digest"] not in known][:limit]
        add_points(self.session, self.search.id, self.model.name, fresh)
        stage = "screening" if screen else "final"
        self.move(job_id=None, proposed=proposed, round=number, stage=stage)
        if not screen:
            self.add_baselines()

    def candidates_left(self) -> int:
        """Return how many candidates the next round may have by the effort that is stated."""
        effort = self.spec.effort
        tasks, seconds = model_spent(self.session, self.search.id, self.model.name)
        measured = sum(point.screened is not None for point in self.points)
        left = effort.candidates
        if effort.seconds is not None and measured:
            left = min(left, int((effort.seconds - seconds) / max(seconds / measured, 1e-9)))
        if effort.tasks is not None:
            left = min(left, int((effort.tasks - tasks) / (tasks / measured if measured else 1.0)))
        return max(left, 0) if measured else max(left, 1)

    def end_round(self) -> None:
        """Note what a round measured; propose the next one, or choose what is measured in full."""
        done = [point for point in self.points if _in_hand(point, self.model)]
        for point in done:
            if point.job_state is JobState.SUCCEEDED:
                self.change([point.number], screened={**(point.measured or {}), "job": point.job})
            else:
                self.change([point.number], dropped=_why_not_measured(point))
        self.points = search_points(self.session, self.search.id, self.model.name)
        if done and self.model.round < self.model.last_round and self.candidates_left():
            self.propose()
            return
        known = self.screened()
        if not known:
            reasons = {point.dropped for point in self.points if point.dropped}
            raise SearchError(f"no candidate could be measured: {'; '.join(sorted(reasons)) or 'none was proposed'}")
        chosen = choose(known, self.spec.budgets, self.spec.points)
        self.drop_behind(known, chosen)
        fresh = [each for each in chosen if self.point(each).stage == "screening"]
        self.change(fresh, stage="final", job_id=None)
        self.move(stage="final", job_id=None)
        self.add_baselines()

    def drop_behind(self, known: Sequence[Measured], chosen: Sequence[int]) -> None:
        """Note of each screened point that does not go on why."""
        beaten = dominators(known)
        by_number = {each.number: each for each in known}
        for each in known:
            if each.number in chosen or self.point(each.number).stage == "final":
                continue
            reason = f"not among the {self.spec.points} points that were measured in full"
            if each.number in beaten:
                by = by_number[beaten[each.number]]
                reason = why_dominated(each, by, self.spec.objective, self.point(by.number).origin)
            self.change([each.number], dropped=f"screening: {reason}")

    def add_baselines(self) -> None:
        """Add what the front is compared with: uniform widths, and the methods' own rules."""
        if not self.spec.baselines:
            return
        model = ModelInfo.read(self.row.digest, self.row.inspection)
        base, space = self.search.recipes[BASE_VARIANT], self.spec.space
        made = list(uniform_points(model, base, space.weight_bits, fixed_layers(model, space)))
        own = [name for name in self.search.recipes if name not in space.variant_names()]
        made += [(name, Allocation(variant=name)) for name in own]
        values = [
            {
                "round": self.model.round,
                "stage": "final",
                "origin": origin,
                "budget": None,
                "allocation": allocation.model_dump(mode="json"),
                "digest": allocation.digest,
                "predicted": None,
            }
            for origin, allocation in made
        ]
        add_points(self.session, self.search.id, self.model.name, values)

    def conclude(self) -> None:
        """Note what was measured in full, drop what is dominated, publish what is wanted."""
        for point in self.points:
            if not _in_hand(point, self.model):
                continue
            if point.job_state is JobState.SUCCEEDED:
                self.change([point.number], metrics=point.measured)
            else:
                self.change([point.number], dropped=_why_not_measured(point))
        self.points = search_points(self.session, self.search.id, self.model.name)
        known = [
            measured
            for point in self.points
            if point.stage == "final"
            and (measured := measured_of(point.number, self.spec.objective, point.metrics, point.predicted))
        ]
        if not known:
            reasons = {point.dropped for point in self.points if point.dropped}
            raise SearchError(f"no point could be measured in full: {'; '.join(sorted(reasons))}")
        by_number = {each.number: each for each in known}
        self.change([each.number for each in known], dropped=None)
        for number, by in dominators(known).items():
            origin = self.point(by).origin
            self.change([number], dropped=why_dominated(by_number[number], by_number[by], self.spec.objective, origin))
        self.publish(known)
        self.move(stage="done", state=JobState.SUCCEEDED.value)

    def publish(self, known: Sequence[Measured]) -> None:
        """Publish the best within each budget, then others of the front, spread by size; smaller ones first."""
        best = [each for budget in self.spec.budgets if (each := best_within(budget, known)) is not None]
        wanted = list({each.number: each for each in best}.values())
        rest = [each for each in front(known) if each.number not in {taken.number for taken in wanted}]
        wanted = choose_published(wanted, rest, self.spec.publish)
        if not wanted:
            return
        lock_graph(self.session)
        name = release_name(self.model.name, self.spec.name)
        for each in sorted(wanted, key=lambda point: point.bytes):
            job = self.point(each.number).job
            if job is not None and (ref := publish_point(self.session, job, name)) is not None:
                self.change([each.number], release=ref)

    def screened(self) -> list[Measured]:
        """Return the points that were measured at few seeds."""
        found = (
            measured_of(point.number, self.spec.objective, point.screened, point.predicted) for point in self.points
        )
        return [each for each in found if each is not None]

    def point(self, number: int) -> SearchPointRow:
        """Return a point by its number."""
        return next(point for point in self.points if point.number == number)


def choose_published(wanted: Sequence[Measured], rest: Sequence[Measured], count: int) -> list[Measured]:
    """Return what is published: first what is wanted, then the others' best spread."""
    taken = list(wanted)[:count]
    return taken + (spread(rest, count - len(taken)) if count > len(taken) else [])


def release_name(model: str, search: str) -> str:
    """Return the name that a model's chosen points are published under."""
    name = f"{model}-{search}"[:_NAME_LENGTH].rstrip("-._")
    check_name(name)
    return name


def _why_not_measured(point: SearchPointRow) -> str:
    """Return why a point has no measurement: what became of its job."""
    return f"{point.stage}: job {point.job} {point.job_error or point.job_state}"


def _fill(service: Service, search: _Search) -> bool:
    """Queue jobs of points that have none, models taking turns, up to what may be in flight."""
    with service.database.session(read_only=True) as session:
        models = {each.name: each for each in search_models(session, search.id)}
        points = search_points(session, search.id)
    waiting = _turns(models, points)
    room = IN_FLIGHT - sum(point.job_state in ACTIVE_JOBS for point in points)
    moved = False
    for point in waiting[: max(room, 0)]:
        moved = _queue(service, search, models[point.model], point) or moved
    return moved


def _turns(models: Mapping[str, SearchModelRow], points: Sequence[SearchPointRow]) -> list[SearchPointRow]:
    """Return the points that wait for a job, one of each model in turn."""
    by_model: dict[str, list[SearchPointRow]] = {name: [] for name in models}
    for point in points:
        model = models[point.model]
        if model.state in ACTIVE_JOBS and point.job is None and model.job is None and _in_hand(point, model):
            by_model[point.model].append(point)
    ranked = [(place, order, each) for order, own in enumerate(by_model.values()) for place, each in enumerate(own)]
    return [each for _, _, each in sorted(ranked, key=lambda entry: entry[:2])]


def _queue(service: Service, search: _Search, model: SearchModelRow, point: SearchPointRow) -> bool:
    """Queue the job that measures a point; a point that cannot be made is dropped, with the reason."""
    try:
        recipe = candidate(
            search.spec, search.recipes, Allocation.model_validate_json(canonical_json(point.allocation))
        )
        if point.stage == "screening":
            recipe = screened(recipe, search.spec.screening)
        with service.database.session(read_only=True) as session:
            row = find_model(session, model.name)
        planned = plan_candidate(row, recipe, released=point.stage == "final")
        with service.database.session() as session:
            lock_enqueue(session)
            if not _is_unchanged(session, search, model):
                return False
            now = {each.number: each for each in search_points(session, search.id, model.name)}[point.number]
            if now.job is not None or now.stage != point.stage:
                return False
            job = queue_job(session, search.row, row, planned)
            update_points(session, search.id, model.name, [point.number], job_id=job)
            return True
    except (DatabaseError, StoreError):
        raise
    except (QuantServiceError, ValueError) as error:
        with service.database.session() as session:
            lock_enqueue(session)
            reason = f"{point.stage}: {' '.join(str(error).split())}"
            update_points(session, search.id, model.name, [point.number], dropped=reason)
        return True


def _finish(service: Service, search: _Search) -> bool:
    """Start a search that has a step behind it; end it when all its models have ended."""
    with service.database.session() as session:
        lock_enqueue(session)
        row = find_search(session, search.id)
        if row.state not in ACTIVE_JOBS:
            return False
        models = search_models(session, search.id)
        if row.state is JobState.QUEUED and any(model.state is not JobState.QUEUED for model in models):
            now = database_time(session)
            update_search(session, search.id, state=JobState.RUNNING.value, started_at=now)
        if any(model.state in ACTIVE_JOBS for model in models):
            return False
        failed = [f"{model.name}: {model.error}" for model in models if model.state is JobState.FAILED]
        state = JobState.FAILED if failed else JobState.SUCCEEDED
        end_search(session, search.id, state, "; ".join(failed) or None)
        return True
