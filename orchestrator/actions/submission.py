"""From what a user asks for to a job in the queue."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.actions.gpu_check import require_gpu
from orchestrator.actions.lora import Lora, with_loras
from orchestrator.actions.registration import Check, register, resolve_model
from orchestrator.actions.rehearsal import rehearse_sampler
from orchestrator.actions.repair import withdraw_if_lost
from orchestrator.db.enqueue import enqueue_graph
from orchestrator.db.jobs import create_job, find_active_job, find_job, job_counts
from orchestrator.db.rows import EnqueueCounts, JobRow, ModelRow
from orchestrator.db.session import lock_enqueue
from orchestrator.planning.pipeline import with_guidance
from orchestrator.planning.planner import plan
from orchestrator.planning.sampler import choice_for
from orchestrator.prompts.choose import notify_repeated, with_prompts
from orchestrator.recipes.load import LoadedRecipe, load_recipe, resolve, store_files
from orchestrator.service import Service
from quant_spec.recipe import Recipe
from workers.storage.model_folder import SampleSize
from workers.storage.names import check_name

#: Release names are this long at most.
_NAME_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Request:
    """What to do to which model: a recipe's name or file, assignments on top, a model's name, folder or hf:ID.

    `sample_size` is for a folder or hf:ID whose config leaves it open. `device` and `gpu_type` go before what the
    recipe says in `resources`, `prompts` and `size` (height and width of a pipeline's images) before its own. `loras`
    are fused into the model first. `here`: this process is to execute it, and a job of the same model, recipe and
    release name that has not ended is what is asked for.
    """

    recipe: str
    model: str
    overrides: tuple[str, ...] = ()
    release_name: str | None = None
    priority: int = 0
    sample_size: SampleSize | None = None
    device: str | None = None
    gpu_type: str | None = None
    here: bool = False
    prompts: Path | None = None
    loras: tuple[Lora, ...] = ()
    size: tuple[int, int] | None = None

    def assignments(self) -> tuple[str, ...]:
        """Return what goes on top of the recipe, in order; what was said of devices is last."""
        prompts = None if self.prompts is None else str(self.prompts)
        own: dict[str, Any] = {"resources.device": self.device, "resources.gpu_type": self.gpu_type, "prompts": prompts}
        if self.size is not None:
            own |= {"sampler.arguments.height": self.size[0], "sampler.arguments.width": self.size[1]}
        return self.overrides + tuple(f"{name}={json.dumps(value)}" for name, value in own.items() if value is not None)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was queued, and how many of its tasks were known already; or one that was, and how many are done."""

    job: JobRow
    counts: EnqueueCounts
    resumed: bool = False


def submit(service: Service, request: Request, *, notify: Callable[[str], None]) -> Submitted:
    """Queue a job; its model is registered first if it is a folder or hf:ID that is not.

    Parameters
    ----------
    service
        Where to.
    request
        What.
    notify
        Called with a line for a person when something takes a while.

    Returns
    -------
    Submitted
        The job ends here if every task's result is recorded.

    Raises
    ------
    RecipeError
        If the recipe is not valid or does not fit the model.
    InvalidInputError
        If the job must have a GPU and is to be executed here alone, where there is none.
    QuantizationError, TaskError
        If its scheduler does not, or gives NaN whatever is predicted.
    ModelError
        If the model folder cannot be used.
    NotFoundError
        If the model is neither registered nor there.
    """
    loaded = load_recipe(request.recipe, request.assignments(), allowed=service.settings.allowed_paths)
    if request.release_name is not None:
        check_name(request.release_name)
    if request.here:
        require_gpu(loaded.recipe, service.settings.ray_address, os.environ)

    def check(model: ModelRow) -> None:
        plan(model, with_prompts(loaded, model).recipe)
        notify_scheduler(model, loaded.recipe, notify)
        rehearse_sampler(service, model, loaded.recipe)

    model = find_or_fuse(service, request, notify=notify, check=check)
    notify_repeated(loaded, notify)
    return enqueue(service, model, loaded, request)


def find_or_fuse(
    service: Service, request: Request, *, notify: Callable[[str], None], check: Check, dry_run: bool = False
) -> ModelRow:
    """Return the model that a request means, registered unless it is a dry run; with LoRA files, one with them."""
    size = request.sample_size
    if not request.loras:
        return resolve_model(service, request.model, notify=notify, dry_run=dry_run, sample_size=size, check=check)
    base = resolve_model(service, request.model, notify=notify, dry_run=dry_run, sample_size=size, register=False)
    model = with_loras(service, base, request.loras, notify=notify, dry_run=dry_run)
    check(model)
    if dry_run:
        return model
    return register(service, model, notify=notify)


def enqueue(service: Service, model: ModelRow, loaded: LoadedRecipe, request: Request) -> Submitted:
    """Plan a job for a registered model and queue it, in one transaction.

    A recorded result of the job's end is believed only if its bytes are there.
    """
    loaded = with_prompts(loaded, model)
    loaded = replace(loaded, recipe=with_guidance(loaded.recipe, model))
    nodes, target = plan(model, loaded.recipe)
    store_files(loaded.files, service.store)
    resolved = resolve(loaded.recipe)
    release_name = request.release_name or default_release_name(model.name, loaded.recipe.name)
    wanted = loaded.recipe.resources
    withdraw_if_lost(service, target.id)
    with service.database.session() as session:
        lock_enqueue(session)
        same = None
        if request.here:
            names = (model.digest, resolved.digest, release_name)
            same = find_active_job(
                session,
                *names,
                device=wanted.device.value,
                gpu_type=wanted.gpu_type,
                deterministic=loaded.recipe.deterministic,
            )
        if same is not None:
            tasks = job_counts(session, same.id)
            return Submitted(same, EnqueueCounts(tasks["total"], tasks["succeeded"]), resumed=True)
        job_id = create_job(
            session,
            model=model,
            recipe_name=loaded.recipe.name,
            recipe=json.loads(resolved.json),
            recipe_digest=resolved.digest,
            release_name=release_name,
            priority=request.priority,
            device=wanted.device.value,
            gpu_type=wanted.gpu_type,
            owner=service.settings.owner,
        )
        counts = enqueue_graph(session, job_id, nodes, target)
        job = find_job(session, job_id)
    return Submitted(job, counts)


def notify_scheduler(model: ModelRow, recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Say which fields of the recipe's scheduler are not the model's own.

    Raises
    ------
    QuantizationError
        If the scheduler does not fit the model.
    """
    note = choice_for(model, recipe).note
    if note is not None:
        notify(note)


def default_release_name(model: str, recipe: str) -> str:
    """Return "model-recipe", cut to the length of a name."""
    return f"{model}-{recipe}"[:_NAME_LENGTH].rstrip("-._")
