"""Reference tasks: full-precision samples and trajectories of a shard of seeds, for whichever pass needs them."""

from __future__ import annotations

from orchestrator.graph import TaskNode
from orchestrator.planning.draft import Draft
from orchestrator.planning.shards import Shard
from quant_spec.prompts import PromptPart
from quant_spec.tasks.reference import KIND, Inputs, Params


def reference(draft: Draft, shard: Shard, batch_size: int, part: PromptPart = PromptPart.CALIBRATION) -> TaskNode:
    """Make the task that samples a shard, and records the trajectories of `shard.recorded` of its seeds."""
    told = draft.told(part)
    params = Params(
        sampler=draft.sampler,
        seeds=shard.seeds,
        batch_size=min(batch_size, shard.count),
        sqnr_seeds=shard.recorded,
        part=told.part,
    )
    cost = draft.costs.sampling(shard.count, params.batch_size, recorded=shard.recorded, decoded=True)
    return draft.node(KIND, params, Inputs(draft.model.digest, told.prompts), cost, shard.label)
