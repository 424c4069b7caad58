"""A job's sampler, tried before anything is queued: one that makes NaN of any prediction fails at its first task."""

from __future__ import annotations

import math
import tempfile

from orchestrator.actions.local import run_task
from orchestrator.db.rows import ModelRow
from orchestrator.planning.sampler import choice_for
from orchestrator.service import Service
from quant_spec.keys import canonical_json
from quant_spec.recipe import Recipe
from quant_spec.scheduler_choice import is_plain
from quant_spec.tasks import rehearse

#: Keywords of a pipeline's call that say where its steps begin, or which they are.
_OWN_STEPS = frozenset({"timesteps", "sigmas", "strength", "denoising_start", "denoising_end"})


def rehearse_sampler(service: Service, model: ModelRow, recipe: Recipe, tried: set[str] | None = None) -> None:
    """Run the steps of a recipe's sampler for a model, without the model.

    Samplers of which it is known that they work, nearly all, are not run: it takes seconds. Nor are those of pipelines
    that begin with an image, or are told their steps: the pipeline's call alone knows them. `tried` are those that were
    run for other models just now; this one is added.

    Raises
    ------
    TaskError
        If they fail, or give NaN or infinity.
    """
    choice, sampler = choice_for(model, recipe), recipe.sampler
    pipeline = model.inspection.get("pipeline") or {}
    if pipeline.get("needs") or _OWN_STEPS & sampler.arguments.keys() or is_plain(choice, sampler.num_inference_steps):
        return
    told = sampler.replaced(scheduler=choice.name, options={}, arguments={})
    # What is not finite is no JSON, and a default wherever it stands (`lambda_min_clipped`)
    config = {name: value for name, value in choice.config.items() if value not in (math.inf, -math.inf)}
    params = rehearse.Params(sampler=told, scheduler_config={**config, "_class_name": choice.name})
    tried = set() if tried is None else tried
    if (name := canonical_json(params.to_json())) in tried:
        return
    tried.add(name)
    with tempfile.TemporaryDirectory(prefix="quantmill-rehearsal-") as folder:
        run_task(service.settings, rehearse.KIND, params, rehearse.Inputs(), store_url=folder)
