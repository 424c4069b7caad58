"""Exceptions: each part of the model quantized alone, by groups of units, and what then stays in full precision."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import QUANTIZE, WORKER_BYTES, Cost, Costs, giga
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit
from orchestrator.planning.groups import group_label
from orchestrator.planning.sensitivity import step_gains_node
from quant_spec.passes.exceptions import Exceptions
from quant_spec.prompts import PromptPart
from quant_spec.task import Seeds, per_unit
from quant_spec.tasks import exceptions as choice
from quant_spec.tasks import trials
from quant_spec.tasks.step_gains import GAINS

_UNITS = 8  # whose parts one task tries, at most
_VALUES = 16384  # kept of one input at one step, to find its range from
_RANGE = 5e7  # MACs of finding one


def exceptions(draft: Draft) -> Drawing:
    """Leave the states with what is excepted; the temporal block's is left as it is."""
    return draft if draft.recipe.passes.round.answers else (yield from _exceptions(draft))


def exceptions_first(draft: Draft) -> Drawing:
    """Do so before codes are chosen, if these are to answer for the inputs that are quantized then."""
    return (yield from _exceptions(draft)) if draft.recipe.passes.round.answers else draft


def _exceptions(draft: Draft) -> Drawing:
    config = draft.recipe.passes.exceptions
    if config is None:
        return draft
    units = draft.units
    layers, attentions = draft.row.inspection["layers"], draft.row.inspection["attentions"]
    macs = {name: layers[name]["macs"] for unit in units for name in unit.planned.layers}
    macs |= {name: attentions[name]["macs"] for unit in units for name in unit.planned.attentions}
    if not any(
        unit.planned.attentions or any(layer.activation for layer in unit.planned.layers.values()) for unit in units
    ):
        raise RecipeError("passes.exceptions: got no quantized input and no attention, wanted at least one")
    told = draft.told(PromptPart.CALIBRATION)
    seeds = Seeds(first=config.first_seed, count=config.seeds)
    measured: list[TaskRef] = []
    for group in _groups(units):
        params = trials.Params(
            sampler=draft.sampler,
            seeds=seeds,
            batch_size=seeds.count,
            weights=config.bytes > 0 and not config.choices,
            part=told.part,
        )
        states = tuple(draft.states[unit.name] for unit in group)
        inputs = trials.Inputs(draft.model.digest, states, told.prompts)
        node = draft.node(trials.KIND, params, inputs, trials_cost(draft.costs, group, config), group_label(group))
        measured.append(TaskRef(node.id, trials.DAMAGES))
        yield node
    total = sum(part["macs"] for part in (*layers.values(), *attentions.values()))
    states = tuple(draft.states[unit.name] for unit in units)
    if config.choices:
        node = yield from _choose_bits(draft, config, tuple(measured), macs=macs, all_macs=total)
    else:
        node = draft.node(
            choice.KIND,
            choice.Params.of(config, macs=macs, all_macs=total),
            choice.Inputs(draft.model.digest, states, tuple(measured)),
            Cost(0.0, WORKER_BYTES + 2 * draft.costs.model_bytes),
            f"{len(macs)} parts",
        )
        yield node
    made = {unit.name: TaskRef(node.id, per_unit(choice.STATE, unit.name)) for unit in units}
    return replace(draft, states={**draft.states, **made})


def _choose_bits(
    draft: Draft, config: Exceptions, damages: tuple[TaskRef, ...], **told: Any
) -> Generator[TaskNode, None, TaskNode]:
    """Make the task that chooses bits of inputs at each step, and the gains of steps if nothing has measured them."""
    layers = {name: layer for unit in draft.units for name, layer in unit.planned.layers.items()}
    names = [name for unit in draft.units for name in unit.changing]
    if not names:
        raise RecipeError(
            "passes.exceptions.choices: got exceptions that state the bits of every layer, wanted one whose bits are "
            "left open"
        )
    states = tuple(draft.states[unit.name] for unit in draft.units)
    gains = draft.gains
    if gains is None:
        measured = step_gains_node(draft, states)
        yield measured
        gains = TaskRef(measured.id, GAINS)
    params = choice.Params.of(
        config,
        **told,
        ranges={name: layers[name].activation_range for name in names},
        seed=draft.recipe.seed,
        forward_batch_size=draft.recipe.calibration.batch_size,
    )
    inputs = choice.Inputs(draft.model.digest, states, damages, draft.calibration, gains)
    node = draft.node(choice.KIND, params, inputs, _bits_cost(draft.costs, len(names)), f"{len(names)} inputs")
    yield node
    return node


def _bits_cost(costs: Costs, layers: int) -> Cost:
    """One pass over the calibration set, a range for each layer and step, and two samples from each layer on."""
    steps, batch = costs.recipe.sampler.num_inference_steps, costs.recipe.calibration.batch_size
    work = costs.replay() + layers * (costs.forward(2 * steps, steps) / 2 + giga(steps * _RANGE))
    # Values that ranges are found from, and what all layers gave, of one sample at all steps.
    held = 4 * steps * max(layers * _VALUES, costs.elements)
    return Cost(work, costs.memory(max(batch, steps), costs.model_bytes + held))


def _groups(units: Sequence[QuantizedUnit]) -> Iterator[Sequence[QuantizedUnit]]:
    for first in range(0, len(units), _UNITS):
        yield units[first : first + _UNITS]


def trials_cost(costs: Costs, group: Sequence[QuantizedUnit], config: Exceptions) -> Cost:
    """One trajectory of each seed for each part, and one in full precision."""
    count = 1 + sum(len(unit.planned.layers) * (1 + (config.bytes > 0 and not config.choices)) for unit in group)
    count += sum(len(unit.planned.attentions) for unit in group)
    once = costs.sampling(config.seeds, config.seeds, decoded=True)
    quantized = giga(config.seeds * costs.calls_per_sample * sum(unit.info.input_elements for unit in group) * QUANTIZE)
    return Cost(count * once.work + quantized, once.memory_bytes)
