"""Evaluate: references and samples of the packed model by shards of seeds, and the figures over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import GIB, WORKER_BYTES, Cost, Costs
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.references import reference
from orchestrator.planning.shards import shards
from quant_spec.enums import Extractor
from quant_spec.prompts import PromptPart
from quant_spec.task import Seeds
from quant_spec.tasks import evaluate as shard_task
from quant_spec.tasks import score
from quant_spec.tasks.reference import REFERENCE

_EXTRACTOR_WORK = {Extractor.EFFICIENTNET_LITE0: 1.1, Extractor.INCEPTION_V3: 6.0}  # GMAC per image
_EXTRACTOR_BYTES = {Extractor.EFFICIENTNET_LITE0: 0.5 * GIB, Extractor.INCEPTION_V3: 1.2 * GIB}


def evaluate(draft: Draft) -> Drawing:
    """Leave the figures of the packed model."""
    section, told = draft.recipe.evaluation, draft.told(PromptPart.EVALUATION)
    whole, packed = None if told.part is None else draft.pipeline_tree, draft.told_packed()
    references: list[TaskRef] = []
    evaluations: list[TaskRef] = []
    for shard in shards(section.first_seed, section.seeds, section.shard_seeds, recorded=section.sqnr_seeds):
        sampled = reference(draft, shard, section.batch_size, told)
        references.append(TaskRef(sampled.id, REFERENCE))
        yield sampled
        batch = min(section.batch_size, shard.count)
        params = shard_task.Params(
            sampler=draft.sampler, seeds=shard.seeds, batch_size=batch, samples=draft.model.samples, part=told.part
        )
        inputs = shard_task.Inputs(draft.packed_model, references[-1], whole, packed.prompts, packed.embeddings)
        cost = evaluate_cost(draft.costs, shard.count, batch, shard.recorded)
        node = draft.node(shard_task.KIND, params, inputs, cost, shard.label)
        evaluations.append(TaskRef(node.id, shard_task.EVALUATION))
        yield node
    node = _score(draft, references, evaluations)
    yield node
    return replace(draft, score=TaskRef(node.id, score.SCORE))


def evaluate_cost(costs: Costs, seeds: int, batch: int, recorded: int) -> Cost:
    """Sampling with the packed model, and its predictions along the recorded trajectories of the references."""
    calls = (seeds + recorded) * costs.calls_per_sample
    kept = recorded * costs.calls_per_sample * costs.sample_bytes * 2
    work = costs.quantized_forward(calls, batch) + costs.around(seeds, decoded=True)
    return Cost(work, costs.memory(batch, kept + costs.packed_bytes + costs.around_bytes, reads=True), kept)


def score_cost(costs: Costs) -> Cost:
    """Features of all samples of both models, and the metrics over them."""
    section = costs.recipe.evaluation
    samples = 2 * section.seeds
    held = _EXTRACTOR_BYTES[section.extractor] + 2 * samples * costs.image_bytes + costs.around_bytes
    work = samples * _EXTRACTOR_WORK[section.extractor] + costs.forward(1, 1)
    return Cost(work, int(WORKER_BYTES + costs.read_bytes + held))


def _score(draft: Draft, references: Sequence[TaskRef], evaluations: Sequence[TaskRef]) -> TaskNode:
    """Make the task that takes the figures over all shards."""
    section, told = draft.recipe.evaluation, draft.told(PromptPart.EVALUATION)
    params = score.Params(
        sampler=draft.sampler,
        seeds=Seeds(first=section.first_seed, count=section.seeds),
        sqnr_seeds=min(section.sqnr_seeds, section.seeds),
        extractor=section.extractor,
        grid=min(section.grid, section.seeds),
        samples=draft.model.samples,
        part=told.part,
        shown=section.shown,
    )
    inputs = score.Inputs(
        packed=draft.packed_model,
        references=tuple(references),
        evaluations=tuple(evaluations),
        model=draft.model.digest,
        extractor_weights=section.extractor_weights,
        prompts=told.prompts,
        clip=section.clip,
        lpips=section.lpips,
        whole=None if told.part is None else draft.pipeline_tree,
    )
    return draft.node(score.KIND, params, inputs, score_cost(draft.costs), f"{section.seeds} seeds")
