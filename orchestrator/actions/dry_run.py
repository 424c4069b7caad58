"""What a job would take, before anything is queued."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.actions.rehearsal import rehearse_sampler
from orchestrator.actions.submission import Request, find_or_fuse, notify_scheduler
from orchestrator.actions.views import components_view
from orchestrator.db.orchestrators import clusters, gpu_types
from orchestrator.db.registry import known_results
from orchestrator.db.timings import kind_timings
from orchestrator.planning.estimate import Estimate, cached_tasks, estimate
from orchestrator.planning.planner import plan
from orchestrator.prompts.choose import notify_repeated, with_prompts
from orchestrator.recipes.load import load_recipe
from orchestrator.service import Service


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a job would take on this machine, with `workers` tasks at once."""

    model: str
    recipe: str
    workers: int
    estimate: Estimate
    components: tuple[dict[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        found = self.estimate
        return {
            "model": self.model,
            "recipe": self.recipe,
            "tasks": {"total": found.tasks, "cached": found.cached, "queued": found.tasks - found.cached},
            "workers": self.workers,
            "estimated_seconds": round(found.seconds, 1),
            "peak_memory_bytes": found.peak_memory_bytes,
            "kinds": {
                name: {"total": kind.tasks, "cached": kind.cached, "estimated_cpu_seconds": round(kind.seconds, 1)}
                for name, kind in found.per_kind.items()
            },
            "component_memory_bytes": dict(found.component_memory),
            "components": list(self.components),
        }


def dry_run_job(service: Service, request: Request, *, notify: Callable[[str], None]) -> DryRun:
    """Estimate a job without queueing it, registering its model, or keeping anything of it in the store.

    Raises
    ------
    RecipeError, QuantizationError, ModelError, NotFoundError
        As `orchestrator.actions.submission.submit` would.
    """
    loaded = load_recipe(request.recipe, request.assignments(), allowed=service.settings.allowed_paths)
    model = find_or_fuse(service, request, notify=notify, check=lambda _: None, dry_run=True)
    loaded = with_prompts(loaded, model)
    notify_scheduler(model, loaded.recipe, notify)
    rehearse_sampler(service, model, loaded.recipe)
    notify_repeated(loaded, notify)
    workers = worker_count()
    with service.database.session(read_only=True) as session:
        cached = cached_tasks(plan(model, loaded.recipe)[0], lambda keys: known_results(session, keys))
        timings = kind_timings(session, gpu_types(clusters(session)))
    found = estimate(plan(model, loaded.recipe)[0], timings, cached, cpus=workers)
    return DryRun(model.name, loaded.recipe.name, workers, found, tuple(components_view(model, loaded.recipe)))


def worker_count() -> int:
    """Return how many tasks this machine runs at once: the CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
