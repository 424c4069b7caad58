from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from quant_core.fit.unit_state import UnitState, collect_state, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, ModelFormat, UnitFormat, WeightSpec

Make = Callable[[str], nn.Module]
LAYER, ATTENTION = "down_blocks.1.attentions.0.to_q", "down_blocks.1.attentions.0"
SPEC = LayerSpec(WeightSpec(4), ActivationSpec(8), None)
FORMATS = UnitFormat(ATTENTION, {LAYER: SPEC}, {ATTENTION: AttentionSpec(ActivationSpec(8))})
OTHER = UnitFormat("conv_in", {"conv_in": LayerSpec(WeightSpec(3, True), None, None)}, {})


def filled(model: nn.Module, formats: UnitFormat, timesteps: tuple[float, ...], seed: int = 0) -> UnitState:
    """The state of a unit whose every number is random."""
    blank = UnitState(formats, timesteps, {})
    parts = build_quantized(model, merge_formats([blank]))
    draw = torch.Generator().manual_seed(seed)
    for module in (*parts.layers.values(), *parts.attentions.values()):
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randint(1, 99, tensor.shape, generator=draw))
    return collect_state(parts, formats, timesteps)


def test_bytes_and_back(tiny_model: Make, tmp_path: Path) -> None:
    state = filled(tiny_model("unet"), FORMATS, (9.0, 5.5, 0.25))
    assert set(state.tensors) == {
        *(f"{LAYER}.{name}" for name in ("qweight", "scale", "zero_point", "bias")),
        *(f"{LAYER}.act_quantizers.0.{name}" for name in ("scale", "zero_point")),
        *(
            f"{ATTENTION}.attention_quantizer.{operand}.{name}"
            for operand in ("query", "key", "value", "probabilities")
            for name in ("scale", "zero_point")
        ),
    }
    data = state.to_bytes()
    back = UnitState.from_bytes(data)
    assert (back.formats, back.timesteps) == (FORMATS, (9.0, 5.5, 0.25))
    assert back.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in state.tensors.items())
    assert back.to_bytes() == data
    (tmp_path / "state").write_bytes(data)
    assert load_file(tmp_path / "state").keys() == state.tensors.keys()


def test_equal_states_give_equal_bytes(tiny_model: Make) -> None:
    one, two, other = (filled(tiny_model("unet"), FORMATS, (9.0,), seed) for seed in (0, 0, 1))
    shuffled = UnitState(FORMATS, (9.0,), dict(reversed(list(two.tensors.items()))))
    assert one.to_bytes() == shuffled.to_bytes()
    assert one.to_bytes() != other.to_bytes()
    assert one.to_bytes() != UnitState(FORMATS, (8.0,), one.tensors).to_bytes()


def test_states_of_several_units_make_one_model(tiny_model: Make) -> None:
    states = [filled(tiny_model("unet"), FORMATS, (9.0, 5.0)), filled(tiny_model("unet"), OTHER, (), 1)]
    model_format = merge_formats(states)
    assert model_format == ModelFormat({LAYER: SPEC, **OTHER.layers}, FORMATS.attentions, (9.0, 5.0))
    model = tiny_model("unet")
    build_quantized(model, model_format)
    load_states(model, states)
    held = model.state_dict()
    for state in states:
        assert all(torch.equal(held[name], value) for name, value in state.tensors.items())


def test_a_model_format_without_per_step_tables_has_no_trajectory() -> None:
    static = LayerSpec(WeightSpec(4), ActivationSpec(8, mode=ActivationMode.STATIC))
    assert merge_formats([UnitState(UnitFormat("a", {"a": static}, {}), (), {})]).timesteps == ()
