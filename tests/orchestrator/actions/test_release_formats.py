"""Bits of a release's layers, as `artifacts diff` compares them."""

from __future__ import annotations

from orchestrator.actions.releases import layer_bits
from quant_spec.formats import ActivationSpec, LayerSpec, QuantizationPlan, WeightSpec
from quant_spec.quantization_config import quantization_config


def test_bits_of_layers_are_read_from_both_versions() -> None:
    plan = QuantizationPlan(
        {
            "a": LayerSpec(WeightSpec(4), ActivationSpec(8)),
            "b": LayerSpec(WeightSpec(8)),
            "c": LayerSpec(WeightSpec(8)),
        },
        {},
    )
    want = {
        "a": {"weights": 4, "activations": 8},
        "b": {"weights": 8, "activations": None},
        "c": {"weights": 8, "activations": None},
    }
    assert layer_bits({"quantization_config": plan.to_json()}) == want
    assert layer_bits({"quantization_config": quantization_config(plan)}) == want
