"""Bits of layers: their mean where channels or steps differ, and how they are distributed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quant_spec.formats import ActivationSpec, FeatureSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.layer_bits import LayerBits, layer_bits

CHANNELS = WeightSpec(3, mixture=((1, 10), (2, 80), (3, 10)))
STEPS = ActivationSpec(8, step_bits=(4,) * 19 + (8,))
EXAMPLES: dict[str, tuple[LayerSpec, dict[str, Any], str]] = {
    "all the same": (LayerSpec(WeightSpec(4), ActivationSpec(8)), {"weights": 4, "activations": 8}, "4/8"),
    "weights only": (LayerSpec(WeightSpec(8)), {"weights": 8, "activations": None}, "8/float"),
    "channels differ": (
        LayerSpec(CHANNELS, ActivationSpec(8)),
        {"weights": 2.0, "activations": 8, "mixture": [[1, 10], [2, 80], [3, 10]]},
        "2.0 (1:10% 2:80% 3:10%)/8",
    ),
    "steps differ": (
        LayerSpec(WeightSpec(4), STEPS),
        {"weights": 4, "activations": 4.2, "step_bits": [4] * 19 + [8]},
        "4/4.2 (4:95% 8:5%)",
    ),
    "one channel of many": (
        LayerSpec(WeightSpec(4, mixture=((3, 1), (4, 999)))),
        {"weights": 3.999, "activations": None, "mixture": [[3, 1], [4, 999]]},
        "4.0 (3:0.1% 4:99.9%)/float",
    ),
    "all channels in the same": (
        LayerSpec(WeightSpec(2, mixture=((2, 7),))),
        {"weights": 2.0, "activations": None, "mixture": [[2, 7]]},
        "2/float",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_bits_are_the_mean_and_say_how_they_are_distributed(name: str) -> None:
    spec, document, text = EXAMPLES[name]
    bits = LayerBits.of(spec)
    assert bits.to_json() == document
    assert bits.text == text
    assert LayerBits.from_json(json.loads(json.dumps(document))) == bits


def test_the_mean_is_an_int_only_where_all_are_the_same() -> None:
    assert isinstance(LayerBits.of(LayerSpec(WeightSpec(4))).weights, int)
    assert json.dumps(LayerBits.of(LayerSpec(CHANNELS)).to_json()["weights"]) == "2.0"


def test_layers_that_are_not_kept_as_layers() -> None:
    plan = ModelFormat({}, {}, (1.0,), features={"table": FeatureSpec(8)}, unserved=("gone",))
    bits = layer_bits(plan)
    assert {name: each.text for name, each in bits.items()} == {"table": "table of 8", "gone": "not kept"}
    assert bits["table"].to_json() == {"weights": None, "activations": None, "table": 8}
    for each in bits.values():
        assert LayerBits.from_json(each.to_json()) == each
