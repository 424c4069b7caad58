"""Calibrate: the denoiser inputs that everything is fitted on, by shards of seeds."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.shards import shards
from quant_spec.prompts import PromptPart
from quant_spec.tasks.calibrate import CALIBRATION, KIND, Inputs, Params


def calibrate(draft: Draft) -> Drawing:
    """Leave the calibration set."""
    section = draft.recipe.calibration
    steps = None if section.steps == draft.sampler.num_inference_steps else section.steps
    told = draft.told(PromptPart.CALIBRATION)
    recorded: list[TaskRef] = []
    for shard in shards(section.first_seed, section.seeds, section.shard_seeds):
        batch = min(section.batch_size, shard.count)
        params = Params(sampler=draft.sampler, seeds=shard.seeds, batch_size=batch, steps=steps, part=told.part)
        cost = draft.costs.sampling(shard.count, batch, recorded=shard.count)
        node = draft.node(KIND, params, Inputs(draft.model.digest, told.prompts, told.embeddings), cost, shard.label)
        recorded.append(TaskRef(node.id, CALIBRATION))
        yield node
    return replace(draft, calibration=tuple(recorded))
