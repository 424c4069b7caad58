"""Each part of a model quantized alone, in the final samples; and states with less in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.denoiser import Denoiser
from quant_core.diffusion.trajectories import LoopTrajectories
from quant_core.fit.exceptions import without_parts
from quant_core.fit.rounding import round_units
from quant_core.fit.trials import Damages, try_parts
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.sampler import Sampler
from tests.quant_core.params import rounding

SAMPLER = Sampler(num_inference_steps=3)
SEEDS = (7, 8)
Made = tuple[Denoiser, list[UnitState]]


@pytest.fixture(scope="module", params=["unet", "sd3"])
def made(
    request: pytest.FixtureRequest,
    calibrated: Callable[..., tuple[Denoiser, CalibrationSet]],
    unit_formats: Callable[..., Any],
) -> Made:
    """A tiny denoiser, and the states of its units: channels scaled, weights of 4 bits."""
    denoiser, calibration = calibrated(request.param)
    formats = unit_formats(denoiser)
    names = [name for unit, _ in formats for name in unit.layers]
    scales = {n: torch.linspace(0.5, 2, denoiser.model.get_parameter(f"{n}.weight").shape[1]) for n in names}
    found = round_units(copy.deepcopy(denoiser.model), calibration, formats, rounding(), scales)
    return denoiser, [each.state for each in found]


def draw(denoiser: Denoiser, model: Any) -> Tensor:
    trajectories = LoopTrajectories(model, denoiser.scheduler_config, SAMPLER, denoiser.conditioning)
    samples = trajectories.run(SEEDS, batch_size=2)
    assert samples is not None
    return samples.samples


def error_of(denoiser: Denoiser, states: list[UnitState]) -> float:
    """Mean square error of the samples of a model that is packed and loaded with these states."""
    model = copy.deepcopy(denoiser.model)
    build_quantized(model, merge_formats(states))
    load_states(model, states)
    return float((draw(denoiser, model) - draw(denoiser, copy.deepcopy(denoiser.model))).double().square().mean())


def tried(denoiser: Denoiser, states: list[UnitState], *, weights: bool) -> Damages:
    model = copy.deepcopy(denoiser.model)
    trajectories = LoopTrajectories(model, denoiser.scheduler_config, SAMPLER, denoiser.conditioning)
    return try_parts(trajectories, states, SEEDS, batch_size=2, weights=weights)


def only(states: list[UnitState], name: str, *, whole: bool) -> list[UnitState]:
    """All parts in full precision but one: a layer with its weight, if `whole`, or an attention."""
    kept = []
    for state in states:
        formats = state.formats
        layers = [n for n in formats.layers if n != name or not whole]
        operands = [n for n in (*formats.layers, *formats.attentions) if n != name]
        kept.append(without_parts(state, operands=operands, layers=layers))
    return kept


def test_a_damage_is_that_of_a_model_in_which_nothing_else_is_quantized(made: Made) -> None:
    denoiser, states = made
    damages = tried(denoiser, states, weights=True)
    parts = {name for state in states for name in state.formats.layers}
    attentions = {name for state in states for name in state.formats.attentions}
    assert (set(damages.inputs), set(damages.weights), set(damages.products)) == (parts, parts, attentions)
    name = next(iter(attentions))
    assert damages.products[name] == pytest.approx(error_of(denoiser, only(states, name, whole=False)), rel=1e-3)
    layer = max(damages.weights, key=lambda each: damages.weights[each])
    alone = [
        without_parts(state, operands=list(state.formats.layers), layers=[])
        for state in only(states, layer, whole=True)
    ]
    assert damages.weights[layer] == pytest.approx(error_of(denoiser, alone), rel=1e-3)
    assert Damages.from_bytes(damages.to_bytes()) == damages


def test_a_state_without_parts_has_neither_their_tables_nor_their_codes(made: Made) -> None:
    _, states = made
    state = next(each for each in states if each.formats.attentions)
    attention, layer, other = next(iter(state.formats.attentions)), *list(state.formats.layers)[:2]
    left = without_parts(state, operands=[attention, layer], layers=[other])
    assert not left.formats.attentions
    assert other not in left.formats.layers
    assert left.formats.layers[layer] == replace(state.formats.layers[layer], activation=None)
    gone = state.tensors.keys() - left.tensors.keys()
    assert {name for name in gone if name.startswith(f"{layer}.")} == {
        f"{layer}.act_quantizers.0.scale",
        f"{layer}.act_quantizers.0.zero_point",
    }
    assert all(name.startswith((f"{layer}.", f"{other}.", f"{attention}.attention_quantizer.")) for name in gone)
    bare = without_parts(state, operands=[*state.formats.layers, attention], layers=[])
    assert bare.timesteps == ()
