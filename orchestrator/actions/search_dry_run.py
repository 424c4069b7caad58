"""What a search would take, before anything is queued: tasks, time, bytes of the store.

The measurement of choices, and what fronts are compared with, are planned exactly. Which candidates there will be is
known only later, but what they take is known now: a random allocation is planned in place of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.actions.dry_run import worker_count
from orchestrator.actions.search_submission import SearchRequest, prepare_search
from orchestrator.db.orchestrators import clusters, gpu_types
from orchestrator.db.registry import known_results
from orchestrator.db.rows import ModelRow, Timing
from orchestrator.db.timings import kind_timings
from orchestrator.graph import TaskNode
from orchestrator.planning.costs import Costs
from orchestrator.planning.estimate import Estimate, cached_tasks, estimate
from orchestrator.planning.model import ModelInfo
from orchestrator.search.baselines import uniform_points
from orchestrator.search.candidates import candidate, screened
from orchestrator.search.fixed import fixed_layers
from orchestrator.search.jobs import plan_candidate
from orchestrator.search.proposing import plan_proposals
from orchestrator.search.warm import shape_digest
from orchestrator.service import Service
from quant_spec.allocation import Allocation, LayerChoice
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT, SearchSpec

#: Candidates of a model that are planned one by one; further ones take what the last of them does.
_PLANNED = 3


@dataclass(frozen=True, slots=True)
class SearchDryRun:
    """What a search would take on this machine, with `workers` tasks at once."""

    name: str
    models: Mapping[str, Estimate]
    workers: int
    tasks: int
    cached: int
    seconds: float
    task_seconds: float
    store_bytes: int

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "name": self.name,
            "models": list(self.models),
            "tasks": {"total": self.tasks, "cached": self.cached, "queued": self.tasks - self.cached},
            "workers": self.workers,
            "estimated_seconds": round(self.seconds, 1),
            "estimated_task_seconds": round(self.task_seconds, 1),
            "estimated_store_bytes": self.store_bytes,
        }


@dataclass(frozen=True, slots=True)
class _ModelPlan:
    """One model's tasks: `nodes` planned one by one, and those of `more` further candidates like `last`."""

    nodes: tuple[TaskNode, ...]
    screening: tuple[tuple[TaskNode, ...], int]
    final: tuple[tuple[TaskNode, ...], int]


def dry_run_search(service: Service, request: SearchRequest, *, notify: Callable[[str], None]) -> SearchDryRun:
    """Estimate a search without queueing it, registering its models, or keeping anything of them in the store.

    Raises
    ------
    SearchError, RecipeError, QuantizationError, ModelError
        As `submit_search` would.
    """
    prepared = prepare_search(service, request, notify=notify, dry_run=True)
    spec = prepared.loaded.spec
    recipes = {name: loaded.recipe for name, loaded in prepared.loaded.recipes.items()}
    workers = worker_count()
    with service.database.session(read_only=True) as session:
        timings = kind_timings(session, gpu_types(clusters(session)))
    models: dict[str, Estimate] = {}
    tasks = cached = 0
    seconds = task_seconds = stored = 0.0
    seen: set[str] = set()
    for model in prepared.models:
        shape = shape_digest(model)
        follows = spec.warm_start is True and request.only is None and shape in seen
        seen.add(shape)
        plan = _plan(model, spec, recipes, prepared.loaded.latency, only=request.only is not None, follows=follows)
        found = _estimate(service, plan.nodes, timings, workers)
        models[model.name] = found
        costs = Costs(ModelInfo.read(model.digest, model.inspection), recipes[BASE_VARIANT])
        own = sum(kind.seconds for kind in found.per_kind.values())
        tasks, cached = tasks + found.tasks, cached + found.cached
        stored += sum(stored_bytes(node, costs) for node in plan.nodes)
        for nodes, more in (plan.screening, plan.final):
            each = estimate(_alone(nodes), timings, cpus=1)
            apiece = sum(kind.seconds for kind in each.per_kind.values())
            own += more * apiece
            tasks += more * each.tasks
            seconds += more * apiece / workers
            stored += more * sum(stored_bytes(node, costs) for node in nodes)
        seconds += found.seconds
        task_seconds += own
    return SearchDryRun(spec.name, models, workers, tasks, cached, seconds, task_seconds, int(stored))


def stored_bytes(node: TaskNode, costs: Costs) -> float:
    """Return about how many bytes of the store a task's outputs take."""
    model = costs.model
    weights = {unit.name: unit.weights for unit in model.units}
    count = int(node.params.get("seeds", {}).get("count", 0)) if isinstance(node.params.get("seeds"), dict) else 0
    trajectory = costs.calls_per_sample * costs.sample_bytes
    if node.kind == "calibrate":
        return count * trajectory
    if node.kind == "reference":
        return count * costs.sample_bytes + 2 * int(node.params.get("recorded", 0)) * trajectory
    if node.kind == "evaluate":
        return count * costs.sample_bytes
    if node.kind in ("menu", "mix", "round"):
        named = [each["name"] if isinstance(each, dict) and "name" in each else "" for each in node.params["units"]]
        widths = len(node.params["weight_bits"]) if node.kind == "menu" else 1
        return widths * sum(weights.get(name, 0) for name in named) or widths * costs.weights
    if node.kind == "answer":
        return costs.weights
    if node.kind == "pack":
        return costs.weights * costs.recipe.weights.bits / 8 + 4 * (model.parameters - costs.weights)
    return _SMALL_BYTES


#: Assumed size of an output that holds a few numbers, or a grid of samples.
_SMALL_BYTES = 64_000


def _plan(
    row: ModelRow,
    spec: SearchSpec,
    recipes: Mapping[str, Recipe],
    latency: Mapping[str, Any] | None,
    *,
    only: bool,
    follows: bool,
) -> _ModelPlan:
    """Plan what is known of a model's search, and some candidates in place of those that will be proposed."""
    model = ModelInfo.read(row.digest, row.inspection)
    proposals = plan_proposals(row, spec, recipes, [], latency)
    nodes = {node.id: node for node in proposals.nodes}
    if follows:
        # Its parent's table is read in place of its own.
        nodes = {node.id: node for node in proposals.nodes if node.kind in ("calibrate", "scale", "temporal", "menu")}
    if only:
        return _ModelPlan(tuple(nodes.values()), ((), 0), ((), 0))
    rounds = max(1, spec.effort.rounds - 1) if follows else spec.effort.rounds
    screening = rounds * spec.effort.candidates if spec.screening.seeds else 0
    allocations = list(_random_allocations(model, spec, max(min(screening, _PLANNED), min(spec.points, _PLANNED))))
    last: tuple[TaskNode, ...] = ()
    for allocation in allocations[:screening]:
        recipe = screened(candidate(spec, recipes, allocation), spec.screening)
        last = _add(nodes, plan_candidate(row, recipe, released=False).nodes)
    full: tuple[TaskNode, ...] = ()
    for allocation in allocations[: spec.points]:
        full = _add(nodes, plan_candidate(row, candidate(spec, recipes, allocation), released=True).nodes)
    if spec.baselines:
        compared = [each for _, each in uniform_points(
            model, recipes[BASE_VARIANT], spec.space.weight_bits, fixed_layers(model, spec.space)
        )]  # fmt: skip
        compared += [Allocation(variant=name) for name in recipes if name not in spec.space.variant_names()]
        for allocation in compared:
            _add(nodes, plan_candidate(row, candidate(spec, recipes, allocation), released=True).nodes)
    more = (max(0, screening - len(allocations)), max(0, spec.points - len(allocations)))
    return _ModelPlan(tuple(nodes.values()), (last, more[0]), (full, more[1]))


def _add(nodes: dict[str, TaskNode], planned: tuple[TaskNode, ...]) -> tuple[TaskNode, ...]:
    """Add tasks that are new; return these."""
    fresh = tuple(node for node in planned if node.id not in nodes)
    nodes.update({node.id: node for node in fresh})
    return fresh


def _alone(nodes: tuple[TaskNode, ...]) -> Iterator[TaskNode]:
    """Yield tasks without what they read: for the sum of their times."""
    for node in nodes:
        yield replace(node, inputs={})


def _random_allocations(model: ModelInfo, spec: SearchSpec, count: int) -> Iterator[Allocation]:
    """Yield allocations that draw each layer's width."""
    draw = random.Random(spec.seed)
    fixed = set(fixed_layers(model, spec.space))
    layers = [layer.name for layer in model.layers if layer.name not in fixed]
    for _ in range(count):
        yield Allocation(layers={name: LayerChoice(weight_bits=draw.choice(spec.space.weight_bits)) for name in layers})


def _estimate(service: Service, nodes: tuple[TaskNode, ...], timings: Mapping[str, Timing], workers: int) -> Estimate:
    """Estimate tasks, of which those that are recorded need no computing."""
    with service.database.session(read_only=True) as session:
        cached = cached_tasks(nodes, lambda keys: known_results(session, keys))
    return estimate(nodes, timings, cached, cpus=workers)
