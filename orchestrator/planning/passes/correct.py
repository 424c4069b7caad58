"""Correct: what quantization adds to the predictions along trajectories, and a sampler that corrects it (PTQD)."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import SMALL, Cost, Costs
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.references import reference
from orchestrator.planning.shards import shards
from quant_spec.prompts import PromptPart
from quant_spec.tasks import correct as fit
from quant_spec.tasks import noise
from quant_spec.tasks.reference import REFERENCE


def correct(draft: Draft) -> Drawing:
    """Leave the packed model with the sampler that corrects it."""
    config = draft.recipe.passes.correct
    if config is None:
        return draft
    per_shard = config.shard_seeds
    fitted = list(shards(config.first_seed, config.seeds, per_shard, recorded=config.seeds))
    held_out = shards(
        config.first_seed + config.seeds, config.held_out_seeds, per_shard, recorded=config.held_out_seeds
    )
    moments: list[TaskRef] = []
    for shard in (*fitted, *held_out):
        size = min(config.batch_size, shard.count)
        cost = noise_cost(draft.costs, shard.count, size)
        if draft.model.pipeline is None:
            sampled = reference(draft, shard, config.batch_size)
            yield sampled
            params = noise.Params(sampler=draft.sampler, batch_size=size)
            inputs = noise.Inputs(draft.packed_model, TaskRef(sampled.id, REFERENCE))
        else:
            # The prompts of the calibration, which each task encodes itself; the pipeline's own call guides.
            told = draft.told(PromptPart.CALIBRATION)
            params = noise.Params(sampler=draft.sampler, batch_size=size, seeds=shard.seeds, part=told.part)
            inputs = noise.Inputs(draft.packed_model, model=draft.model.digest, prompts=told.prompts)
            exact = draft.costs.sampling(shard.count, size, recorded=0)
            cost = Cost(cost.work + exact.work, max(cost.memory_bytes, exact.memory_bytes) + draft.costs.model_bytes)
        node = draft.node(noise.KIND, params, inputs, cost, shard.label)
        moments.append(TaskRef(node.id, noise.NOISE))
        yield node
    node = draft.node(
        fit.KIND,
        fit.Params.of(config, channel_dim=-1 if draft.model.has_tokens else 1),
        fit.Inputs(draft.packed_model, tuple(moments[: len(fitted)]), tuple(moments[len(fitted) :])),
        SMALL,
        f"{config.seeds} seeds",
    )
    yield node
    return replace(draft, packed=TaskRef(node.id, fit.PACKED))


def noise_cost(costs: Costs, seeds: int, batch: int) -> Cost:
    """Predictions of the packed model along recorded trajectories."""
    work = costs.quantized_forward(seeds * costs.calls_per_sample, batch)
    return Cost(work, costs.memory(batch, costs.model_bytes))
