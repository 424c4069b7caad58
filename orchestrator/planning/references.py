"""Reference tasks: full-precision samples and trajectories of a shard of seeds, for whichever pass needs them."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskNode
from orchestrator.planning.draft import Draft, Told
from orchestrator.planning.shards import Shard
from quant_spec.prompts import PromptPart
from quant_spec.tasks.reference import KIND, Inputs, Params


def reference(draft: Draft, shard: Shard, batch_size: int, told: Told | None = None) -> TaskNode:
    """Make the task that samples a shard, and records the trajectories of `shard.recorded` of its seeds.

    Parameters
    ----------
    told
        What a whole pipeline is told; by default the calibration's prompts, which the task then encodes itself.
    """
    told = replace(draft.told(PromptPart.CALIBRATION), embeddings=None) if told is None else told
    params = Params(
        sampler=draft.sampler,
        seeds=shard.seeds,
        batch_size=min(batch_size, shard.count),
        sqnr_seeds=shard.recorded,
        part=told.part,
    )
    cost = draft.costs.sampling(shard.count, params.batch_size, recorded=shard.recorded, decoded=True)
    return draft.node(KIND, params, Inputs(draft.model.digest, told.prompts, told.embeddings), cost, shard.label)
