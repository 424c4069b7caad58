"""MPQ-DM's tasks: bits of each output channel before rounding, distillation of the whole model after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import Costs
from orchestrator.planning.formats import UnitPlan, allocated_layers
from orchestrator.planning.groups import group_label
from orchestrator.planning.shards import shards
from quant_spec.passes.allocate import Allocate
from quant_spec.passes.distill import Distill
from quant_spec.recipe import Recipe

#: (kind, parameters, inputs, cost, label) -> a task
Make = Callable[..., TaskNode]
Inputs = Mapping[str, Sequence[str | TaskRef]]


def allocation_tasks(
    make: Make,
    groups: Sequence[Sequence[UnitPlan]],
    inputs: Inputs,
    factors: Mapping[str, TaskRef],
    config: Allocate,
    common: Mapping[str, Any],
    costs: Costs,
) -> Iterator[TaskNode]:
    """Make the tasks that measure what bits do to each layer, and the choice last.

    Parameters
    ----------
    groups
        Units that one task measures, all together; none of a group without allocated layers.
    inputs
        Model and calibration.
    factors
        By unit, where input channels are scaled.
    common
        Seed and batch size.
    """
    measured: list[TaskRef] = []
    for group in groups:
        names = allocated_layers(group)
        if not names:
            continue
        params = {"units": [_settled(each) for each in group], "layers": names, **common, **config.measurement()}
        scaled = {"factors": [factors[each.unit.name] for each in group]} if factors else {}
        cost = costs.channel_errors(group, config)
        node = make("channel_errors", params, {**inputs, **scaled}, cost, group_label(group))
        measured.append(TaskRef(node.id, "errors"))
        yield node
    if measured:
        cost = costs.step_bits()
        yield make("allocate", config.parameters(), {"errors": measured}, cost, config.method, gpus=0.0)


def _settled(plan: UnitPlan) -> dict[str, Any]:
    """Return a unit's parameters with 8-bit activations where their bits are chosen for each step meanwhile."""
    parameters = plan.parameters()
    layers = {}
    for name, layer in parameters["layers"].items():
        activation = layer["activation"]
        open_bits = activation is not None and activation["bits"] is None
        layers[name] = layer | {"activation": activation | {"bits": 8}} if open_bits else layer
    return parameters | {"layers": layers}


def distill_tasks(
    make: Make,
    states: Mapping[str, TaskRef],
    model: tuple[str, ...],
    recipe: Recipe,
    config: Distill,
    costs: Costs,
) -> Iterator[TaskNode]:
    """Make the trajectories that are distilled from, and the task that does it, last.

    Parameters
    ----------
    states
        By unit, in the order in which they run.
    """
    sampler = recipe.sampler.model_dump(mode="json")
    trajectories: list[TaskRef] = []
    for shard in shards(config.first_seed, config.seeds, config.shard_seeds, config.seeds):
        params = {"sampler": sampler, "seeds": shard.seeds, "batch_size": shard.count, "sqnr_seeds": shard.count}
        cost = costs.sample(shard.count, shard.count, recorded=shard.count)
        node = make("reference", params, {"model": model}, cost, shard.label)
        trajectories.append(TaskRef(node.id, "reference"))
        yield node
    inputs: Inputs = {"model": model, "trajectories": trajectories, "states": list(states.values())}
    task = {"units": list(states), "seed": recipe.seed, **config.parameters()}
    yield make("distill", task, inputs, costs.distill(config), f"{config.iterations} iterations")
