"""The graph that measures what every choice for every layer does to a model, and takes.

    calibrate ─┬─ (temporal, scale) ─┬─ menu (units) ─┬─ step_gains ─┬─ sensitivity (units) ── ...
               └─────────────────────┘                └──────────────┘

The tasks up to `menu` are those of any job whose recipe has the same menu; all are those of one that chooses by itself
(`orchestrator.planning.passes.choose`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from orchestrator.db.rows import ModelRow
from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import Cost, Costs, giga
from orchestrator.planning.draft import Draft, Source
from orchestrator.planning.groups import group_label
from orchestrator.planning.passes.calibrate import calibrate
from orchestrator.planning.passes.encode import encode
from orchestrator.planning.passes.menu import MenuGroup, menu_groups
from orchestrator.planning.passes.scale import scale
from orchestrator.planning.passes.temporal import take_out, temporal
from quant_spec.allocation import Allocation, apply_allocation
from quant_spec.enums import ActivationMode
from quant_spec.passes.choose import GAIN_SEEDS
from quant_spec.passes.menu import Menu
from quant_spec.prompts import PromptPart
from quant_spec.recipe import Recipe
from quant_spec.tasks import menu as rounded
from quant_spec.tasks import sensitivity, step_gains


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """What is measured, and on how much.

    Attributes
    ----------
    widths
        The menu: weight bits, and activation bits beside the base recipe's.
    step_ranges
        Equal ranges of trajectory steps with activation bits of their own.
    promoted
        Shares of output channels at the next width that are choices too.
    fixed
        Globs of layers that stay as the base recipe says.
    path
        Points on the way from full precision to the middle width; 0 measures each layer alone.
    rows
        Calibration rows, most of them of the steps where most of the damage is made.
    """

    widths: Menu = field(default_factory=Menu)
    step_ranges: int = 1
    promoted: tuple[float, ...] = ()
    fixed: tuple[str, ...] = ()
    path: int = 2
    rows: int = 10


@dataclass(frozen=True, slots=True)
class SensitivityPlan:
    """The tasks, each after all that it depends on, and where the tables are that they leave."""

    nodes: tuple[TaskNode, ...]
    tables: tuple[TaskRef, ...]


def plan_sensitivity(model: ModelRow, recipe: Recipe, options: SensitivityOptions) -> SensitivityPlan:
    """Plan the measurement of every choice for a model.

    Parameters
    ----------
    model
        With its inspection.
    recipe
        The base recipe, that of one variant.

    Raises
    ------
    RecipeError
        If the recipe does not fit the model, or its activations have no steps to tell ranges apart.
    InvalidInputError
        If it chooses bits by itself.
    """
    for name, mode in recipe.modes.items():
        if options.step_ranges > 1 and mode is not ActivationMode.PER_STEP:
            raise RecipeError(f"step_ranges: got {options.step_ranges} with {name} {mode}, wanted per_step")
    draft = take_out(Draft.begin(model, apply_allocation(recipe, Allocation(), options.widths)))
    nodes: list[TaskNode] = []
    for draw in (encode, calibrate, temporal, scale):
        made = draw(draft)
        while True:
            try:
                nodes.append(next(made))
            except StopIteration as end:
                draft = end.value
                break
    groups = list(menu_groups(draft, options.widths))
    nodes += [group.node for group in groups]
    measured = list(measuring(draft, groups, options))
    return SensitivityPlan((*nodes, *measured), tables_of(measured))


def measuring(draft: Draft, groups: Sequence[MenuGroup], options: SensitivityOptions) -> Iterator[TaskNode]:
    """Make the tasks that measure every choice of a menu: the gains of steps, then groups of units."""
    context = _context(groups, options.widths)
    gains = step_gains_node(draft, context)
    yield gains
    yield from _tables(draft, groups, context, TaskRef(gains.id, step_gains.GAINS), options)


def tables_of(nodes: Iterable[TaskNode]) -> tuple[TaskRef, ...]:
    """Return the tables that these tasks leave."""
    return tuple(TaskRef(node.id, sensitivity.TABLE) for node in nodes if node.kind == sensitivity.KIND.name)


def middle_width(widths: Sequence[int]) -> int:
    """Return the width that other layers have in context: the lower median."""
    return sorted(widths)[(len(widths) - 1) // 2]


def _context(groups: Sequence[MenuGroup], widths: Menu) -> tuple[Source, ...]:
    """Return the weights of all units at the middle width."""
    middle = middle_width(widths.weight_bits)
    return tuple(
        group.state(rounded.WEIGHTS, middle, unit.name)
        for group in groups
        for unit in group.units
        if unit.planned.layers
    )


def step_gains_node(draft: Draft, context: tuple[Source, ...]) -> TaskNode:
    """Make the task that measures what an error at each step, of these units' weights, does to the final samples."""
    told = draft.told(PromptPart.CALIBRATION)
    params = step_gains.Params(sampler=draft.sampler, seeds=GAIN_SEEDS, batch_size=GAIN_SEEDS.count, part=told.part)
    inputs = step_gains.Inputs(draft.model.digest, context, told.prompts)
    steps, per_step = draft.sampler.num_inference_steps, draft.sampler.calls_per_step
    calls = GAIN_SEEDS.count * per_step * (steps * (steps + 1) // 2 + (2 + len(context)) * steps)
    cost = Cost(
        draft.costs.forward(calls, GAIN_SEEDS.count),
        draft.costs.memory(GAIN_SEEDS.count * per_step, 3 * draft.costs.model_bytes),
    )
    return draft.node(step_gains.KIND, params, inputs, cost, f"{steps} steps")


def _tables(
    draft: Draft,
    groups: Sequence[MenuGroup],
    context: tuple[Source, ...],
    gains: TaskRef,
    options: SensitivityOptions,
) -> Iterator[TaskNode]:
    """Make the tasks that measure, one for each group of units."""
    names = tuple(unit.name for unit in draft.model.units)
    for place, group in enumerate(groups):
        layers: dict[str, int] = {}
        fixed: dict[str, int] = {}
        for unit in group.units:
            macs = {layer.name: layer.macs for layer in unit.info.layers}
            layers |= {name: macs[name] for name in unit.planned.layers} | dict.fromkeys(unit.planned.attentions, 0)
            for name, layer in unit.planned.layers.items():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.fixed):
                    fixed[name] = layer.weight.bits
        params = sensitivity.Params(
            units=names,
            layers=layers,
            fixed=fixed,
            promoted=options.promoted,
            step_ranges=options.step_ranges,
            path=options.path,  # type: ignore[arg-type]
            rows=options.rows,
            forward_batch_size=draft.recipe.calibration.batch_size,
            counts_rest=place == 0,
        )
        block = draft.states[draft.block.name] if draft.block is not None and place == 0 else None
        inputs = sensitivity.Inputs(
            model=draft.model.digest,
            calibration=draft.calibration,
            gains=gains,
            context=context,
            weights=_states(group, rounded.WEIGHTS),
            activations=_states(group, rounded.ACTIVATIONS),
            errors=tuple(group.errors(unit.name) for unit in group.units) if options.promoted else (),
            temporal=block,
        )
        cost = sensitivity_cost(draft.costs, group, options)
        yield draft.node(sensitivity.KIND, params, inputs, cost, group_label(group.units))


def _states(group: MenuGroup, output: str) -> tuple[Source, ...]:
    """Return the states of a group's units at all widths."""
    found: list[Source] = []
    for unit in group.units:
        widths: list[int | str] = [*group.weight_widths(unit)]
        if output == rounded.ACTIVATIONS:
            quantized = any(layer.activation for layer in unit.planned.layers.values()) or unit.planned.attentions
            widths = [rounded.BASE, *group.widths.activation_bits] if quantized else []
        found += [group.state(output, width, unit.name) for width in widths]
    return tuple(found)


def sensitivity_cost(costs: Costs, group: MenuGroup, options: SensitivityOptions) -> Cost:
    """For each layer, width and path point a forward from that layer on."""
    batch = costs.recipe.calibration.batch_size
    rows = max(options.rows, options.step_ranges)
    work, largest = 0.0, 0
    points = max(1, options.path)
    for unit in group.units:
        tries = 1 + len(options.widths.weight_bits) + 1 + len(options.widths.activation_bits)
        calls = tries * len(unit.planned.layers) + len(unit.planned.attentions)
        work += points * calls * costs.forward(rows, batch) * max(0.1, 1 - unit.info.depth)
        largest += 4 * unit.info.weights * len(options.widths.weight_bits)
    kept = batch * sum(unit.output_bytes for unit in costs.model.units)
    return Cost(work + giga(1), costs.memory(batch, 2 * costs.model_bytes + largest + kept))
