"""Menu: every unit rounded once at each width, and the state of each unit mixed from what exact names choose.

Where the job chooses itself (`passes.choose`), that pass has the menu made, and mixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode, TaskRef
from orchestrator.planning.costs import WORKER_BYTES, Cost, Costs
from orchestrator.planning.draft import Draft, Drawing, Source
from orchestrator.planning.formats import QuantizedUnit
from orchestrator.planning.groups import group_label, unit_groups
from orchestrator.planning.passes.round import round_cost
from quant_spec.enums import Granularity
from quant_spec.passes.menu import Menu
from quant_spec.passes.round import RoundFit
from quant_spec.planned import PlannedAttention, PlannedLayer
from quant_spec.task import per_unit
from quant_spec.tasks import menu as rounded
from quant_spec.tasks import mix


@dataclass(frozen=True, slots=True)
class MenuGroup:
    """A task that rounds some units, which are told in the base's formats."""

    units: tuple[QuantizedUnit, ...]
    node: TaskNode
    widths: Menu

    def state(self, output: str, width: int | str, unit: str) -> TaskRef:
        """Return the state of one unit at one width."""
        return TaskRef(self.node.id, rounded.menu_output(output, width, unit))

    def tables(self, choice: mix.MixedUnit) -> list[Source]:
        """Return the states with activation tables that a unit takes."""
        steps = [layer.activations for layer in choice.layers.values() if layer.activations is not None]
        steps += [attention.activations for attention in choice.attentions.values()]
        used = {bits for step in steps for bits in step} & set(self.widths.activation_bits)
        widths: list[int | str] = [rounded.BASE, *sorted(used)] if steps else []
        return [self.state(rounded.ACTIVATIONS, width, choice.unit) for width in widths]

    def errors(self, unit: str) -> TaskRef:
        """Return the errors of one unit's output channels."""
        return TaskRef(self.node.id, per_unit(rounded.ERRORS, unit))

    def weight_widths(self, unit: QuantizedUnit) -> list[int]:
        """Return the widths that there are states of."""
        base = {layer.weight.bits for layer in unit.planned.layers.values()}
        return sorted(base | set(self.widths.weight_bits)) if unit.planned.layers else []


def menu(draft: Draft) -> Drawing:
    """Leave the state of each unit, if the recipe has a menu that exact names choose from."""
    config = draft.recipe.passes.menu
    if config is None or draft.recipe.passes.choose is not None:
        return draft
    check_choices(draft, config)
    chosen = {unit.name: unit for unit in draft.units}
    states = dict(draft.states)
    for group in menu_groups(draft, config):
        yield group.node
        units = [(base, chosen[base.name]) for base in group.units if base.name in chosen]
        if not units:
            continue
        node = _mix_node(draft, group, units)
        states |= {unit.name: TaskRef(node.id, per_unit(mix.STATE, unit.name)) for _, unit in units}
        yield node
    return replace(draft, states=states)


def menu_groups(draft: Draft, config: Menu) -> Iterator[MenuGroup]:
    """Make the tasks that round all units, in groups."""
    rounding = draft.recipe.passes.round
    widths = len(config.weight_bits)
    for group in unit_groups(draft, draft.base_units, lambda units: menu_cost(draft.costs, units, rounding, widths)):
        params = rounded.Params.of(
            rounding,
            **{name: getattr(config, name) for name in Menu.model_fields},
            units=tuple(unit.planned for unit in group),
            seed=draft.recipe.seed,
            forward_batch_size=draft.recipe.calibration.batch_size,
        )
        factors = tuple(draft.factors[unit.name] for unit in group) if draft.factors else ()
        inputs = rounded.Inputs(draft.model.digest, draft.calibration, factors)
        cost = menu_cost(draft.costs, group, rounding, widths)
        node = draft.node(rounded.KIND, params, inputs, cost, group_label(group))
        yield MenuGroup(tuple(group), node, config)


def menu_cost(costs: Costs, group: Sequence[QuantizedUnit], config: RoundFit, widths: int) -> Cost:
    """Cost of `round`, with the codes of each layer found at so many widths."""
    once = round_cost(costs, group, config)
    layers = [
        costs.ranged(layer, unit.planned.layers[layer.name]) + costs.codes(layer, config)
        for unit in group
        for layer in unit.info.layers
        if layer.name in unit.planned.layers
    ]
    weights = sum(4 * unit.info.weights * widths for unit in group)
    return Cost(once.work + (widths - 1) * sum(layers), once.memory_bytes + weights)


def _mix_node(draft: Draft, group: MenuGroup, units: Sequence[tuple[QuantizedUnit, QuantizedUnit]]) -> TaskNode:
    """Make the task that mixes a group's units, each told in the base's formats and in those chosen."""
    weights: list[Source] = []
    activations: list[Source] = []
    errors: list[Source] = []
    mixed = []
    for base, unit in units:
        choice = mixed_unit(base, unit, group.widths)
        mixed.append(choice)
        layers = choice.layers.values()
        taken = {bits for layer in layers for bits in (layer.weights, layer.promoted_bits) if bits is not None}
        weights += [group.state(rounded.WEIGHTS, bits, unit.name) for bits in sorted(taken)]
        activations += group.tables(choice)
        if any(layer.promoted for layer in layers):
            errors.append(group.errors(unit.name))
    params = mix.Params(units=tuple(mixed))
    inputs = mix.Inputs(tuple(weights), tuple(activations), tuple(errors))
    cost = Cost(0.0, int(WORKER_BYTES + 4 * sum(unit.info.weights for _, unit in units)))
    return draft.node(mix.KIND, params, inputs, cost, group_label([unit for _, unit in units]))


def mixed_unit(base: QuantizedUnit, unit: QuantizedUnit, widths: Menu) -> mix.MixedUnit:
    """Return what a unit takes from the menu."""
    layers = {}
    for name, layer in unit.planned.layers.items():
        promoted = unit.promoted.get(name, 0.0)
        layers[name] = mix.MixedLayer(
            weights=layer.weight.bits,  # type: ignore[arg-type]  # of `Bits`, as the record checks
            promoted=promoted,
            promoted_bits=next_width(base, name, layer, widths) if promoted else None,  # type: ignore[arg-type]
            activations=_steps(layer, unit.range_bits.get(name)),  # type: ignore[arg-type]
        )
    attentions = {
        name: mix.MixedAttention(
            activations=unit.range_bits.get(name) or (attention.activation.bits,),  # type: ignore[arg-type]
            softmax=attention.softmax_bits,  # type: ignore[arg-type]
        )
        for name, attention in unit.planned.attentions.items()
    }
    return mix.MixedUnit(unit=base.name, layers=layers, attentions=attentions)


def next_width(base: QuantizedUnit, name: str, layer: PlannedLayer, menu: Menu) -> int | None:
    """Return the least width on the menu above a layer's; None if there is none."""
    widths = (*menu.weight_bits, base.planned.layers[name].weight.bits)
    return min((width for width in widths if width > layer.weight.bits), default=None)


def _steps(layer: PlannedLayer, ranges: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return a layer's activation bits, by range of steps."""
    if layer.activation is None or layer.activation.bits is None:
        return None
    return ranges or (layer.activation.bits,)


def check_choices(draft: Draft, menu: Menu) -> None:
    """Refuse bits that are not on the menu.

    Raises
    ------
    RecipeError
        Naming the first layer.
    """
    base = {unit.name: unit for unit in draft.base_units}
    for unit in draft.units:
        own = base.get(unit.name)
        for name, layer in unit.planned.layers.items():
            given = None if own is None else own.planned.layers.get(name)
            if own is None or given is None:
                raise RecipeError(f"layer {name}: got bits where the base keeps full precision, wanted it on the menu")
            _check(f"layer {name}: weights.bits", [layer.weight.bits], [*menu.weight_bits, given.weight.bits])
            _check_activations(name, layer, given, unit.range_bits, menu)
            if name in unit.promoted:
                _check_promotion(own, name, layer, menu)
        for name, attention in unit.planned.attentions.items():
            of_base = None if own is None else own.planned.attentions.get(name)
            if of_base is None:
                raise RecipeError(f"attention {name}: got bits where the base has none, wanted it on the menu")
            _check_activations(name, attention, of_base, unit.range_bits, menu)


def _check_activations(
    name: str,
    chosen: PlannedLayer | PlannedAttention,
    base: PlannedLayer | PlannedAttention,
    ranges: Mapping[str, tuple[int, ...]],
    menu: Menu,
) -> None:
    """Refuse activation bits that are not on the menu."""
    if chosen.activation is None or base.activation is None:
        return
    on_menu = [*menu.activation_bits, *([] if base.activation.bits is None else [base.activation.bits])]
    own = [] if chosen.activation.bits is None else [chosen.activation.bits]
    _check(f"{name}: activations", ranges.get(name) or own, on_menu)


def _check_promotion(base: QuantizedUnit, name: str, layer: PlannedLayer, menu: Menu) -> None:
    """Refuse promoted channels where formats, or the menu, have no room for them."""
    if layer.weight.granularity is not Granularity.PER_CHANNEL:
        raise RecipeError(f"layer {name}: weights.promoted: got weights {layer.weight.granularity}, wanted per_channel")
    if next_width(base, name, layer, menu) is None:
        raise RecipeError(
            f"layer {name}: weights.promoted: got {layer.weight.bits} bits, wanted wider ones in "
            "passes.menu.weight_bits"
        )


def _check(what: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if wrong := [bits for bits in got if bits not in wanted]:
        on_menu = ", ".join(map(str, sorted(set(wanted))))
        raise RecipeError(f"{what}: got {wrong[0]} bits, wanted one of the menu's {on_menu}")
