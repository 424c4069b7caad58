"""Both layouts of `quantization_config`."""

from __future__ import annotations

import json

import pytest

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
    with pytest.raises(QuantizationError, match="version: got 3, wanted 1 or 2"):
        parse_quantization_config(quantization_config(PLAN) | {"version": 3})
