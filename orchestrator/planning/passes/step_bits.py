"""Step bits: what bits do at each trajectory step, by shards of seeds, and the choice of bits for each step."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import QUANTIZE, SMALL, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import varied_layers
from orchestrator.planning.shards import shards
from quant_spec.prompts import PromptPart
from quant_spec.tasks import step_bits as choice
from quant_spec.tasks import step_effects as effects


def step_bits(draft: Draft) -> Drawing:
    """Leave the choice of bits for each step, if the recipe asks for it and some layer's bits are open."""
    section, layers = draft.recipe.activations.step_bits, varied_layers(draft.units)
    if section is None or not layers:
        return draft
    measured: list[TaskRef] = []
    # The prompts of the calibration, which each task encodes itself: their embeddings are those of other seeds.
    told = draft.told(PromptPart.CALIBRATION)
    for shard in shards(section.first_seed, section.seeds, section.shard_seeds):
        params = effects.Params(
            sampler=draft.sampler,
            seeds=shard.seeds,
            batch_size=shard.count,
            choices=tuple(section.choices),
            layers=layers,
            seed=draft.recipe.seed,
            part=told.part,
        )
        cost = effects_cost(draft.costs, shard.count, len(section.choices))
        inputs = effects.Inputs(draft.model.digest, draft.calibration, told.prompts)
        node = draft.node(effects.KIND, params, inputs, cost, shard.label)
        measured.append(TaskRef(node.id, effects.EFFECTS))
        yield node
    node = draft.node(choice.KIND, choice.Params.of(section), choice.Inputs(tuple(measured)), SMALL, section.method)
    yield node
    return replace(draft, step_bits=TaskRef(node.id, choice.STEP_BITS))


def effects_cost(costs: Costs, seeds: int, choices: int) -> Cost:
    """Ranges over the calibration set, then sampling from every step on, for every choice of bits."""
    sampler = costs.recipe.sampler
    steps, per_step = sampler.num_inference_steps, sampler.calls_per_step
    calls = seeds * per_step * (steps + choices * (steps * (steps - 1) // 2))
    work = costs.replay() + costs.forward(calls, seeds)
    work += giga(costs.calibrated * costs.elements * QUANTIZE)
    work += costs.quantized_forward(seeds * per_step * choices * steps, seeds)
    kept = seeds * steps * (per_step + 3 * choices) * costs.sample_bytes
    return Cost(work, costs.memory(seeds, kept + 2 * costs.model_bytes), kept)
