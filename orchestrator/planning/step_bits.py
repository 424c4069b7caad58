"""The tasks that choose activation bits for each trajectory step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import Costs
from orchestrator.planning.mpqdm import Inputs, Make
from orchestrator.planning.shards import shards
from quant_spec.passes.step_bits import StepBits


def step_bits_tasks(
    make: Make, section: StepBits, common: Mapping[str, Any], inputs: Inputs, costs: Costs
) -> Iterator[TaskNode]:
    """Make the tasks that measure what bits do at each step, and the choice last.

    Parameters
    ----------
    common
        Sampler, layers and seed.
    inputs
        Model and calibration.
    """
    effects: list[TaskRef] = []
    for shard in shards(section.first_seed, section.seeds, section.shard_seeds):
        params = {**common, "seeds": shard.seeds, "batch_size": shard.count, "choices": section.choices}
        cost = costs.step_effects(shard.count, shard.count, len(section.choices))
        node = make("step_effects", params, inputs, cost, shard.label)
        effects.append(TaskRef(node.id, "effects"))
        yield node
    yield make("step_bits", section.parameters(), {"effects": effects}, costs.step_bits(), section.method, gpus=0.0)
