"""Choose: every choice of a menu measured, and the weight bits with the least damage within a budget.

The tasks that measure are those of a search (`orchestrator.planning.sensitivity`). Which bits a layer gets is known
when the job runs: later passes are told none, and read states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import WORKER_BYTES, Cost
from orchestrator.planning.draft import Draft, Drawing, Source
from orchestrator.planning.passes.menu import MenuGroup, check_choices, menu_groups, mixed_unit
from orchestrator.planning.sensitivity import SensitivityOptions, measuring, tables_of
from quant_spec.numbers import human_bytes
from quant_spec.passes.choose import Choose
from quant_spec.passes.menu import Menu
from quant_spec.recipe_formats import exact_name
from quant_spec.search import unmet_text
from quant_spec.task import per_unit
from quant_spec.tasks import choose as choice
from quant_spec.tasks import menu as rounded
from quant_spec.tasks.step_gains import GAINS
from quant_spec.tasks.step_gains import KIND as step_gains


def choose(draft: Draft) -> Drawing:
    """Leave the state of each unit, if the job chooses bits by itself."""
    config, menu = draft.recipe.passes.choose, draft.recipe.passes.menu
    if config is None or menu is None:
        return draft
    check_choices(draft, menu)
    fixed = fixed_layers(draft)
    _check_reach(draft, config, _widths(draft, menu, frozenset(fixed)))
    groups = list(menu_groups(draft, menu))
    for group in groups:
        yield group.node
    measured = list(measuring(draft, groups, SensitivityOptions(widths=menu, rows=config.rows, path=config.path)))
    yield from measured
    node = _choose_node(draft, config, groups, tables_of(measured), fixed)
    yield node
    made = {unit.name: TaskRef(node.id, per_unit(choice.STATE, unit.name)) for unit in draft.units}
    gains = next(TaskRef(each.id, GAINS) for each in measured if each.kind == step_gains.name)
    return replace(draft, states={**draft.states, **made}, gains=gains)


def fixed_layers(draft: Draft) -> tuple[str, ...]:
    """Return the layers, in order, that an exact name gives bits."""
    entries = draft.recipe.layers
    stated = {exact_name(entry.match) for entry in entries if entry.weights.bits is not None}
    return tuple(name for unit in draft.units for name in unit.planned.layers if name in stated)


def _widths(draft: Draft, menu: Menu, fixed: Collection[str]) -> dict[str, list[int]]:
    """Return the widths that each layer may have, rising."""
    base = {name: layer.weight.bits for unit in draft.base_units for name, layer in unit.planned.layers.items()}
    own = {name: layer.weight.bits for unit in draft.units for name, layer in unit.planned.layers.items()}
    return {n: [bits] if n in fixed else sorted({base[n], *menu.weight_bits}) for n, bits in own.items()}


def _check_reach(draft: Draft, config: Choose, widths: Mapping[str, Sequence[int]]) -> None:
    """Refuse, before anything is measured, a budget that codes alone show to be out of reach.

    Raises
    ------
    RecipeError
        With what can be reached.
    """
    sizes = {layer.name: layer.weights for unit in draft.units for layer in unit.info.layers if layer.name in widths}
    if not sizes:
        raise RecipeError("passes.choose: got no layer on the menu, wanted one whose weights are quantized")
    least, most = (sum(size * widths[name][end] for name, size in sizes.items()) for end in (0, -1))
    low, high = (bits / sum(sizes.values()) for bits in (least, most))
    mean = config.weight_bits_mean
    if mean is not None and mean < low * (1 - 1e-12):
        raise RecipeError(unmet_text("weight_bits_mean", mean, low, high, "passes.choose"))
    if config.bytes is not None and config.bytes < least / 8:
        raise RecipeError(
            f"passes.choose.bytes: got {human_bytes(config.bytes)}, wanted more than {human_bytes(least / 8)}, which "
            "codes alone take at the fewest bits"
        )


def _choose_node(
    draft: Draft, config: Choose, groups: list[MenuGroup], tables: tuple[TaskRef, ...], fixed: tuple[str, ...]
) -> TaskNode:
    """Make the task that chooses, and mixes all units."""
    chosen = {unit.name: unit for unit in draft.units}
    weights: list[Source] = []
    activations: list[Source] = []
    units, widths = [], []
    most = 0
    for group, base in ((each, unit) for each in groups for unit in each.units if unit.name in chosen):
        unit = mixed_unit(base, chosen[base.name], group.widths)
        own = group.weight_widths(base) if unit.layers else []
        weights += [group.state(rounded.WEIGHTS, bits, base.name) for bits in own]
        activations += group.tables(unit)
        units.append(unit)
        widths.append(tuple(own))
        most = max(most, (4 + len(own)) * base.info.weights)
    params = choice.Params.of(config, units=tuple(units), widths=tuple(widths), fixed=fixed)
    inputs = choice.Inputs(tables, tuple(weights), tuple(activations))
    return draft.node(choice.KIND, params, inputs, Cost(0.0, WORKER_BYTES + most), f"{len(units)} units")
