"""Both layouts of `quantization_config`."""

from __future__ import annotations

import json

import pytest

from quant_spec.enums import Granularity, GroupScale
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.quantization_config import QUANT_METHOD, parse_quantization_config, quantization_config

PLAN = ModelFormat(
    {
        "a": LayerSpec(WeightSpec(4), ActivationSpec(8)),
        "b": LayerSpec(WeightSpec(8)),
        "c": LayerSpec(WeightSpec(8)),
    },
    {},
)


def test_both_versions_say_the_same() -> None:
    first = {"quant_method": QUANT_METHOD, "version": 1, **PLAN.to_json()}
    second = quantization_config(PLAN)
    assert (second["version"], second["layers"], len(second["formats"])) == (2, {"a": 0, "b": 1, "c": 1}, 2)
    for config in (first, second):
        assert parse_quantization_config(json.loads(json.dumps(config))) == PLAN


def test_a_version_to_come_is_refused() -> None:
    with pytest.raises(QuantizationError, match="version: got 4, wanted 1 or 2 or 3"):
        parse_quantization_config(quantization_config(PLAN) | {"version": 4})


def test_integer_scales_of_groups_are_of_version_3() -> None:
    """A Quantmill that does not know them refuses the number."""
    weight = WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=32, group_scale=GroupScale.INTEGER)
    plan = ModelFormat({"a": LayerSpec(weight), "b": LayerSpec(WeightSpec(8))}, {})
    config = quantization_config(plan)
    assert (config["version"], quantization_config(PLAN)["version"]) == (3, 2)
    assert "group_scale" not in json.dumps(quantization_config(PLAN))
    assert parse_quantization_config(json.loads(json.dumps(config))) == plan
