"""Encode: what the prompts of the calibration's and of the evaluation's seeds encode to, for the tasks that sample."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import WORKER_BYTES, Cost, Costs
from orchestrator.planning.draft import Draft, Drawing, Source
from quant_spec.prompts import PromptPart
from quant_spec.sampler import Sampler
from quant_spec.task import Seeds
from quant_spec.tasks.encode import EMBEDDINGS, KIND, Inputs, Params


def encode(draft: Draft) -> Drawing:
    """Leave the embeddings of both parts, if the model is a pipeline that can be given its prompts encoded."""
    whole, recipe = draft.model.pipeline, draft.recipe
    if whole is None or not whole.encodes or draft.prompts is None:
        return draft
    made: dict[PromptPart, Source] = {}
    for part, first, count in (
        (PromptPart.CALIBRATION, recipe.calibration.first_seed, recipe.calibration.seeds),
        (PromptPart.EVALUATION, recipe.evaluation.first_seed, recipe.evaluation.seeds),
    ):
        params, inputs = encoding(draft, part, first, count)
        node = draft.node(KIND, params, inputs, encode_cost(draft.costs, count), part.value)
        made[part] = TaskRef(node.id, EMBEDDINGS)
        yield node
    return replace(draft, embeddings=made)


def encoding(draft: Draft, part: PromptPart, first: int, count: int) -> tuple[Params, Inputs[Source]]:
    """Return what a task is told that encodes the prompts of some seeds, with the encoders of the draft's pipeline."""
    if draft.prompts is None:
        raise ValueError("encode: got a model that is told no prompts, wanted one that is")
    params = Params(sampler=told_by_encoders(draft.sampler), part=part, seeds=Seeds(first=first, count=count))
    return params, Inputs(draft.pipeline_tree, draft.prompts)


def told_by_encoders(sampler: Sampler) -> Sampler:
    """Return of a sampler what may decide what is encoded: recipes that differ elsewhere share the task."""
    return Sampler(guidance_scale=sampler.guidance_scale, arguments=sampler.arguments)


def encode_cost(costs: Costs, seeds: int) -> Cost:
    """Text encoders on so many prompts; the denoiser has no weights here."""
    whole = costs.model.pipeline
    if whole is None:
        raise ValueError("encode: got a bare denoiser, wanted a whole pipeline")
    return Cost(seeds * whole.encode_gmacs, WORKER_BYTES + whole.other_bytes)
