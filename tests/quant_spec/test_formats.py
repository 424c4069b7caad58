from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from quant_spec.enums import ActivationMode, Granularity, GroupScale, UnknownTimestep
from quant_spec.errors import QuantizationError
from quant_spec.formats import (
    EXACT_SOFTMAX_BITS,
    ActivationSpec,
    AttentionSpec,
    FeatureSpec,
    LayerSpec,
    ModelFormat,
    UnitFormat,
    WeightSpec,
)


def test_a_model_format_survives_json() -> None:
    model_format = ModelFormat(
        layers={
            "a": LayerSpec(WeightSpec(4, True, Granularity.PER_GROUP, 8), ActivationSpec(6), (3, 5)),
            "b": LayerSpec(WeightSpec(3, granularity=Granularity.PER_TENSOR)),
        },
        attentions={"c": AttentionSpec(ActivationSpec(8, True, ActivationMode.DYNAMIC_TOKEN), 5)},
        timesteps=(900.0, 0.25),
        unknown_timestep=UnknownTimestep.NEAREST,
    )
    assert ModelFormat.from_json(json.loads(json.dumps(model_format.to_json()))) == model_format


def test_a_unit_format_survives_json_and_says_nothing_of_features_without_them() -> None:
    layers = {"a": LayerSpec(WeightSpec(4), ActivationSpec(8))}
    plain = UnitFormat("block", layers, {"b": AttentionSpec(ActivationSpec(8))})
    assert plain.to_json().keys() == {"unit", "layers", "attentions"}
    cached = UnitFormat("@temporal", layers, {}, {"c": FeatureSpec(8, 5)}, ("d",))
    for unit in (plain, cached):
        assert UnitFormat.from_json(json.loads(json.dumps(unit.to_json()))) == unit


@pytest.mark.parametrize("bits", [0, 1, 7, 16])
def test_widths_that_packing_lacks_are_refused(bits: int) -> None:
    makes = [WeightSpec, ActivationSpec]
    if bits != EXACT_SOFTMAX_BITS:
        makes.append(lambda b: AttentionSpec(ActivationSpec(8), b))
    for make in makes:
        with pytest.raises(QuantizationError, match=f"got {bits} bits, wanted one of 2, 3, 4, 5, 6, 8"):
            make(bits)


@pytest.mark.parametrize("more", [{"group_size": 8}, {"granularity": "per_group"}])
def test_a_group_size_belongs_to_per_group(more: dict[str, Any]) -> None:
    with pytest.raises(QuantizationError, match="wanted a size exactly for per_group"):
        WeightSpec(4, **more)


@pytest.mark.parametrize(
    "more", [{"bits": 8, "granularity": "per_group", "group_size": 8}, {"bits": 4}, {"bits": 6, "mixture": ((6, 1),)}]
)
def test_integer_scales_are_of_groups_of_6_bits_at_most(more: dict[str, Any]) -> None:
    with pytest.raises(
        QuantizationError, match=r"group_scale: got integer with \d bits .*, wanted per_group with 6 bits"
    ):
        WeightSpec(**more, group_scale=GroupScale.INTEGER)


def test_8_bits_leave_no_room_for_multipliers() -> None:
    narrow = WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=8, group_scale=GroupScale.INTEGER)
    assert narrow.with_bits(6) == replace(narrow, bits=6)
    assert narrow.with_bits(8) == WeightSpec(8)
    floats = WeightSpec(4, granularity=Granularity.PER_GROUP, group_size=8)
    assert floats.with_bits(8) == replace(floats, bits=8)


@pytest.mark.parametrize(
    ("mode", "is_dynamic"), [("static", False), ("per_step", False), ("dynamic_sample", True), ("dynamic_token", True)]
)
def test_which_modes_are_dynamic(mode: str, is_dynamic: bool) -> None:
    assert ActivationSpec(8, mode=mode).is_dynamic is is_dynamic  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="often"):
        ActivationSpec(8, mode="often")  # type: ignore[arg-type]


def test_bits_of_each_step_survive_json_and_are_written_only_where_they_differ() -> None:
    spec = ActivationSpec(8, step_bits=(4, 6, 8))
    layer = LayerSpec(WeightSpec(4), spec)
    assert LayerSpec.from_json(json.loads(json.dumps(layer.to_json()))) == layer
    assert spec.bits_mean == 6
    assert ActivationSpec(8).bits_mean == 8
    assert "step_bits" not in LayerSpec(WeightSpec(4), ActivationSpec(8)).to_json()["activation"]
    assert "step_bits" not in AttentionSpec(ActivationSpec(8)).to_json()["activation"]


def test_bits_of_each_step_must_fit_the_rest() -> None:
    with pytest.raises(QuantizationError, match="got 7 bits"):
        ActivationSpec(8, step_bits=(7, 8))
    with pytest.raises(QuantizationError, match="got a greatest of 6 with 8 bits per_step"):
        ActivationSpec(8, step_bits=(4, 6))
    with pytest.raises(QuantizationError, match="got a greatest of 8 with 8 bits static"):
        ActivationSpec(8, mode=ActivationMode.STATIC, step_bits=(4, 8))
