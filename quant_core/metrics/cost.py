"""What a model costs: bits per weight and activation, bit operations, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from quant_core.inspect.trace import Trace
from quant_spec.formats import LOW_RANK_BITS, ModelFormat

FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a denoiser call at batch 1, averaged over the trajectory where activation bits differ between its steps.

    Attributes
    ----------
    weight_bits_mean : float
        Over the weights of all Conv and Linear layers, low-rank branches added to theirs; a layer whose outputs are
        looked up counts the bits of its table and no multiplications; a layer that was dropped counts neither.
    act_bits_mean : float
        Over the multiplications of all Conv and Linear layers; those of low-rank branches are of unquantized inputs.
    bops, bops_fp32 : int
        Bit operations: sum of MACs x weight bits x activation bits; attention matmuls with the bits of their operands.
    bops_per_step : tuple of int
        At each trajectory step, if they differ.
    """

    weight_bits_mean: float
    act_bits_mean: float
    bops: int
    bops_fp32: int
    bops_per_step: tuple[int, ...] = ()


def model_cost(inspection: Mapping[str, Any], model_format: ModelFormat) -> Cost:
    """Add up the cost of a model quantized by `model_format`; whatever it does not name is float32 (32 x 32 bits).

    Parameters
    ----------
    inspection : mapping
        From `quant_core.inspect.inspection`: of `inspect_model` or `describe_layers`.
    """
    weights = macs = bops = saved = branch_macs = 0
    weight_bits = act_bits = 0.0
    for name, layer in inspection["layers"].items():
        if name in model_format.features or name in model_format.unserved:
            weights, weight_bits = weights + prod(layer["shape"]), weight_bits + _table_bits(name, layer, model_format)
            saved += layer["macs"]
            continue
        spec = model_format.layers.get(name)
        bits_w = FLOAT_BITS if spec is None else spec.weight.bits_mean
        bits_a = FLOAT_BITS if spec is None or spec.activation is None else spec.activation.bits_mean
        count = prod(layer["shape"])
        weights, weight_bits = weights + count, weight_bits + count * bits_w
        macs, act_bits = macs + layer["macs"], act_bits + layer["macs"] * bits_a
        bops += round(layer["macs"] * bits_w * bits_a)
        if spec is not None and spec.low_rank:
            held = spec.low_rank * (layer["shape"][0] + prod(layer["shape"][1:]))
            beside = layer["macs"] * held // count
            weight_bits, bops = weight_bits + held * LOW_RANK_BITS, bops + beside * LOW_RANK_BITS * FLOAT_BITS
            branch_macs, act_bits = branch_macs + beside, act_bits + beside * FLOAT_BITS
    attention_macs = sum(attention["macs"] for attention in inspection["attentions"].values())
    bops += sum(_attention_bops(item["macs"], model_format, name) for name, item in inspection["attentions"].items())
    per_step = tuple(bops + change for change in _step_changes(inspection, model_format))
    return Cost(
        weight_bits / weights,
        act_bits / (macs + branch_macs),
        bops,
        (macs + saved + attention_macs) * FLOAT_BITS**2,
        per_step,
    )


def difference_state_bytes(trace: Trace, model_format: ModelFormat) -> int:
    """Return what layers in differences remember between steps, for one row of the batch.

    Of each, the input that it stands for and its output, float32.

    Parameters
    ----------
    trace : Trace
        Of one forward of the original model at batch 1.
    """
    total = 0
    for name, spec in model_format.layers.items():
        if spec.activation is not None and spec.activation.differences:
            total += sum(trace.spans[name])
    return total


def _step_changes(inspection: Mapping[str, Any], model_format: ModelFormat) -> list[int]:
    """Return how the bit operations of each step differ from their mean; nothing if no bits do."""
    changes: list[float] = []
    for name, spec in model_format.layers.items():
        if spec.activation is None or not spec.activation.step_bits:
            continue
        macs = inspection["layers"][name]["macs"] * spec.weight.bits_mean
        own = [macs * (bits - spec.activation.bits_mean) for bits in spec.activation.step_bits]
        changes = [a + b for a, b in zip(changes, own, strict=True)] if changes else own
    return [round(change) for change in changes]


def _table_bits(name: str, layer: Mapping[str, Any], model_format: ModelFormat) -> int:
    """Return the bits of the table that stands for a layer; 0 for a layer that was dropped."""
    spec = model_format.features.get(name)
    return 0 if spec is None else len(model_format.timesteps) * spec.labels * layer["shape"][0] * spec.bits


def _attention_bops(macs: int, model_format: ModelFormat, name: str) -> int:
    """Return the bit operations of an attention: half its MACs are query x key, half probabilities x value."""
    spec = model_format.attentions.get(name)
    if spec is None:
        return macs * FLOAT_BITS**2
    bits = spec.activation.bits
    return macs * bits * bits // 2 + macs * bits * spec.softmax_bits // 2
