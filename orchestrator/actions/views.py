"""What the command line shows of jobs, models and releases, as JSON; a page could show the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from orchestrator.db.rows import EventRow, JobRow, ModelRow, ReleaseRow
from orchestrator.errors import RecipeError
from orchestrator.planning.components import is_text_encoder
from orchestrator.recipes.load import recipe_from_json
from orchestrator.text import utc_text
from quant_spec.components import text_encoders
from quant_spec.recipe import Recipe


def job_view(job: JobRow, tasks: Mapping[str, int], now: float, waiting: str | None = None) -> dict[str, Any]:
    """Return a job as `run`, `jobs show` and `jobs wait` show it.

    Parameters
    ----------
    job
        The job.
    tasks
        Counts: total, cached, succeeded, failed, running, queued.
    now
        The database's time; `seconds` runs from submission to the end, or to now.
    waiting
        What it waits for beyond its turn (`orchestrator.db.waiting`).
    """
    return {
        "job": job.id,
        "state": job.state.value,
        "waiting": waiting,
        "model": job.model_name,
        "recipe": job.recipe_name,
        "tasks": {name: tasks[name] for name in ("total", "cached", "succeeded", "failed", "running", "queued")},
        "seconds": round(max((job.finished_at or now) - job.created_at, 0.0), 3),
        "release": job.release,
        "digest": job.digest,
        "metrics": job.metrics,
        "error": job.error,
        "priority": job.priority,
        "owner": job.owner,
        "search": job.search,
        "device": job.device,
        "gpu_type": job.gpu_type,
        "model_digest": job.model_digest,
        "recipe_digest": job.recipe_digest,
        "created_at": utc_text(job.created_at),
        "started_at": utc_text(job.started_at),
        "finished_at": utc_text(job.finished_at),
    }


def release_view(release: ReleaseRow) -> dict[str, Any]:
    """Return a release as `artifacts ls` and `artifacts show` show it."""
    return {
        "name": release.name,
        "version": release.version,
        "digest": release.digest,
        "bytes": release.bytes,
        "aliases": list(release.aliases),
        "job": release.job,
        "created_at": utc_text(release.created_at),
        "metrics": release.metrics,
    }


def model_view(model: ModelRow) -> dict[str, Any]:
    """Return a model as `models ls` shows it."""
    return {
        "name": model.name,
        "digest": model.digest,
        "class_name": model.class_name,
        "source": model.source,
        "bytes": model.bytes,
        "parameters": model.parameters,
        "created_at": utc_text(model.created_at),
        "pipeline": (model.inspection.get("pipeline") or {}).get("class_name"),
        "components": components_view(model),
        "loras": model.inspection.get("loras", []),
    }


def components_view(model: ModelRow, recipe: Recipe | None = None) -> list[dict[str, Any]]:
    """Return the components of a whole pipeline, and whether each would be quantized; none for a bare denoiser.

    `quantized`: by any recipe, or by the given one; `can_be`: whether `components` of a recipe can name it. With a
    recipe, `format` says how.
    """
    pipeline = model.inspection.get("pipeline")
    if pipeline is None:
        return []
    names = [part["name"] for part in pipeline["components"] if is_text_encoder(part)]
    encoders = {} if recipe is None else text_encoders(recipe.components, names)
    views = []
    for part in pipeline["components"]:
        name = part["name"]
        is_denoiser = name == pipeline["denoiser"]
        view = {key: part[key] for key in ("name", "class_name", "parameters", "bytes")}
        view |= {"quantized": is_denoiser or name in encoders, "can_be": is_denoiser or name in names}
        if recipe is not None:
            weights = recipe.weights if is_denoiser else encoders[name][1] if name in encoders else None
            activations = recipe.activations.bits if is_denoiser else None
            view["format"] = weights and f"W{weights.bits}" + (f"A{activations}" if activations else "")
        views.append(view)
    return views


def event_view(event: EventRow, kind: str | None, label: str | None) -> dict[str, Any]:
    """Return one event of a job's log; `kind` and `label` are those of its task, None for an event of the job."""
    return {
        "id": event.id,
        "at": utc_text(event.at),
        "job": event.job,
        "task": event.task,
        "kind": kind,
        "label": label,
        "attempt": event.attempt,
        "event": event.event,
        "data": dict(event.data),
    }


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a resolved recipe as YAML in the schema's order; one that an older schema resolved, as it is."""
    try:
        ordered = recipe_from_json(recipe).model_dump(mode="json")
    except RecipeError:
        ordered = dict(recipe)
    return yaml.safe_dump(ordered, sort_keys=False, width=110, allow_unicode=True)
