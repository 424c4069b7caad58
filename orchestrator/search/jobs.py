"""The jobs of a search: one for each measurement of a candidate, one for each round of proposals."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.db.enqueue import enqueue_graph
from orchestrator.db.jobs import create_job
from orchestrator.db.rows import ModelRow, SearchRow
from orchestrator.db.session import Session
from orchestrator.graph import TaskNode
from orchestrator.planning.planner import plan
from orchestrator.recipes.load import resolve
from quant_spec.recipe import Recipe


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job's graph, and the recipe that it is shown with."""

    recipe: Recipe
    nodes: tuple[TaskNode, ...]
    target: TaskNode


def plan_candidate(model: ModelRow, recipe: Recipe, *, released: bool) -> PlannedJob:
    """Plan a candidate's measurement; `released`: to what can be published."""
    nodes, target = plan(model, recipe, released=released)
    return PlannedJob(recipe, tuple(nodes), target)


def queue_job(session: Session, search: SearchRow, model: ModelRow, job: PlannedJob) -> str:
    """Queue a job of a search, in its caller's transaction; return its id."""
    resolved, wanted = resolve(job.recipe), job.recipe.resources
    job_id = create_job(
        session,
        model=model,
        recipe_name=job.recipe.name,
        recipe=json.loads(resolved.json),
        recipe_digest=resolved.digest,
        priority=search.priority,
        device=wanted.device.value,
        gpu_type=wanted.gpu_type,
        owner=search.owner,
        search=search.id,
    )
    nodes: Iterable[TaskNode] = job.nodes
    enqueue_graph(session, job_id, nodes, job.target)
    return job_id
