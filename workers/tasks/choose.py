"""Choose: each layer's weight bits within a budget, and the states of all units with them.

The format of a state is that of `quant_core.fit.unit_state`. Metrics: `layers`, {layer: bits}; `bytes`, of the packed
file by the tables; `weight_bits_mean`; `damage` of the chosen bits and `damage_own` of the recipe's own, both sums of
mean square errors of the final samples.
"""

from __future__ import annotations

from collections import defaultdict

from quant_core.fit.menu import mix_unit
from quant_core.fit.unit_state import UnitState
from quant_core.search.chosen import choose_bits
from quant_spec.documents import read_json
from quant_spec.errors import InvalidInputError
from quant_spec.numbers import significant
from quant_spec.record import Bits
from quant_spec.sensitivity_table import merge_tables
from quant_spec.task import per_unit
from quant_spec.tasks.choose import STATE, Inputs, Params
from quant_spec.tasks.mix import MixedUnit
from workers.execution.context import TaskContext, TaskOutput
from workers.tasks.inputs import read_states


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Choose for a model, and mix its units."""
    states = _by_unit_and_width(params, inputs)
    table = merge_tables([read_json(context.store.get_bytes(digest), "table") for digest in inputs.tables])
    own = {name: layer.weights for unit in params.units for name, layer in unit.layers.items()}
    chosen = choose_bits(table, own, params.fixed, params.limits())
    tables: defaultdict[str, list[UnitState]] = defaultdict(list)
    for state in read_states(inputs.activations, context):
        tables[state.formats.unit].append(state)
    outputs = {}
    for unit in params.units:
        layers = {name: layer.replaced(weights=chosen.bits[name]) for name, layer in unit.layers.items()}
        choice = MixedUnit(unit=unit.unit, layers=layers, attentions=unit.attentions)
        # one unit's at a time, and of its widths those that were chosen
        taken = [states[unit.unit, bits] for bits in sorted({layer.weights for layer in layers.values()})]
        made = mix_unit(choice, read_states(taken, context), tables[unit.unit], {})
        outputs[per_unit(STATE, unit.unit)] = context.store.put_bytes(made.to_bytes())
    metrics = {
        "layers": dict(chosen.bits),
        "bytes": round(chosen.price.uses["bytes"]),
        "weight_bits_mean": round(chosen.price.uses["weight_bits_mean"], 4),
        "damage": significant(chosen.price.damage),
        "damage_own": significant(chosen.own.damage),
    }
    return TaskOutput(outputs, metrics)


def _by_unit_and_width(params: Params, inputs: Inputs[str]) -> dict[tuple[str, Bits], str]:
    """Return the digests of the states with weights."""
    pairs = zip(params.units, params.widths, strict=False)
    keys = [(unit.unit, bits) for unit, widths in pairs for bits in widths]
    if len(params.widths) != len(params.units) or len(keys) != len(inputs.weights):
        raise InvalidInputError(
            f"widths: got {len(keys)} of {len(params.widths)} units, wanted one for each of {len(inputs.weights)} "
            f"states of {len(params.units)} units"
        )
    return dict(zip(keys, inputs.weights, strict=True))
