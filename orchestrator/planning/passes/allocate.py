"""Allocate: what bits do to the output channels of groups of units, and the choice of each channel's (MPQ-DM)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.graph import TaskRef
from orchestrator.planning.costs import QUANTIZE, SEARCH, SMALL, Cost, Costs, giga, hessian_bytes
from orchestrator.planning.draft import Draft, Drawing
from orchestrator.planning.formats import QuantizedUnit, allocated_layers
from orchestrator.planning.groups import group_label, unit_groups
from quant_spec.enums import RoundingMethod
from quant_spec.passes.allocate import Allocate
from quant_spec.passes.round import RoundFit
from quant_spec.planned import PlannedUnit
from quant_spec.tasks import allocate as choice
from quant_spec.tasks import channel_errors as errors

#: Rows of each trajectory step in a forward for each layer, as in `quant_core.methods.mpqdm.channel_errors`.
EFFECT_SAMPLES = 2
_OPEN_BITS = 8  # of activations whose bits are chosen for each step meanwhile


def allocate(draft: Draft) -> Drawing:
    """Leave the choice of bits of output channels, if any layer's channels have bits of their own."""
    config = draft.recipe.passes.allocate
    if config is None or config.is_uniform:
        return draft
    measured: list[TaskRef] = []
    rounding = draft.recipe.passes.round
    for group in unit_groups(draft, draft.units, lambda units: errors_cost(draft.costs, units, config, rounding)):
        names = allocated_layers(group)
        if not names:
            continue
        params = errors.Params.of(
            config,
            units=tuple(_with_closed_bits(unit.planned.before_allocation()) for unit in group),
            layers=names,
            rounding=rounding.method,
            damping=rounding.damping,
            correct_bias=rounding.correct_bias,
            seed=draft.recipe.seed,
            forward_batch_size=draft.recipe.calibration.batch_size,
        )
        factors = tuple(draft.factors[unit.name] for unit in group) if draft.factors else ()
        inputs = errors.Inputs(draft.model.digest, draft.calibration, factors)
        node = draft.node(
            errors.KIND, params, inputs, errors_cost(draft.costs, group, config, rounding), group_label(group)
        )
        measured.append(TaskRef(node.id, errors.ERRORS))
        yield node
    if not measured:
        return draft
    node = draft.node(choice.KIND, choice.Params.of(config), choice.Inputs(tuple(measured)), SMALL, config.method)
    yield node
    return replace(draft, allocation=TaskRef(node.id, choice.ALLOCATION))


def errors_cost(costs: Costs, group: Sequence[QuantizedUnit], config: Allocate, rounding: RoundFit) -> Cost:
    """Ranges over the calibration set at three widths, then forwards for each layer."""
    calibration, depth = costs.recipe.calibration, group[-1].info.depth
    samples = min(config.samples, calibration.seeds) * costs.recorded_per_seed
    names = set(allocated_layers(group))
    layers = [layer for unit in group for layer in unit.info.layers if layer.name in names]
    work = costs.replay(depth) + costs.forward(samples, config.samples) * depth
    rows_per_layer = min(samples, EFFECT_SAMPLES * costs.recorded_per_seed)
    work += costs.forward(rows_per_layer, calibration.batch_size) * len(layers)
    for layer in layers:
        rows = samples * min(config.positions, layer.positions)
        work += giga(layer.weights * (3 * SEARCH + 5 * rows) + samples * layer.input_elements * QUANTIZE)
        if rounding.method is RoundingMethod.CLOSED_FORM:
            rows = costs.calibrated * min(config.positions, layer.positions)
            work += giga(rows * layer.columns**2 + 2 * layer.columns**3 + 3 * layer.weights * layer.columns)
    held = sum(4 * 5 * layer.weights for layer in layers) + sum(hessian_bytes(unit.info, rounding) for unit in group)
    return Cost(work, costs.memory(calibration.batch_size, held))


def _with_closed_bits(unit: PlannedUnit) -> PlannedUnit:
    """Return a unit with 8-bit activations where their bits are open."""
    return replace(unit, layers={name: layer.with_bits(_OPEN_BITS) for name, layer in unit.layers.items()})
