"""TFMQ-DM: the temporal block fitted over its finite set, its features in tables, and the model that results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quant_core
from quant_core.artifact.dequantize import dequantized_state
from quant_core.artifact.folder import write_artifact
from quant_core.diffusion.calibration import Batch, CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.errors import ArtifactError, ConditioningError, UnknownTimestepError
from quant_core.fit.reconstruction import reconstruct_unit
from quant_core.fit.rounding import UnitRanges, round_units
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.inspect.inspection import inspect_model
from quant_core.methods.tfmq.finite_set import enumerate_set, feature_error
from quant_core.methods.tfmq.temporal_block import TemporalReport, correct_biases, fit, reconstruct
from quant_core.metrics.cost import model_cost
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode, StartCodes, TemporalRounding, UnknownTimestep
from quant_spec.formats import ActivationSpec, FeatureSpec, UnitFormat
from quant_spec.passes.temporal import TemporalFit
from quant_spec.quantization_config import quantization_config
from tests.quant_core.params import reconstruction, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
ChooseFormats = Callable[..., list[tuple[UnitFormat, UnitRanges]]]

CLOSED = TemporalFit(method=TemporalRounding.CLOSED_FORM)


def split(
    units: Sequence[tuple[UnitFormat, UnitRanges]], names: Sequence[str]
) -> tuple[tuple[UnitFormat, UnitRanges], list[tuple[UnitFormat, UnitRanges]]]:
    """Take the named layers out of their units."""
    layers = {name: spec for formats, _ in units for name, spec in formats.layers.items() if name in names}
    ranges = UnitRanges(
        {name: each.weights[name] for _, each in units for name in each.weights if name in names},
        {name: each.activations[name] for _, each in units for name in each.activations if name in names},
    )
    rest = [
        (replace(f, layers={n: s for n, s in f.layers.items() if n not in names}), r)
        for f, r in units
        if set(f.layers) - set(names)
    ]
    return (UnitFormat("@temporal", layers, {}), ranges), rest


def fitted(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats, config: TemporalFit = CLOSED, **formats: Any
) -> tuple[UnitState, TemporalReport, list[tuple[UnitFormat, UnitRanges]]]:
    denoiser, calibration = calibrated(family, 2)
    block = list(inspect_model(denoiser)["temporal"])
    (own, ranges), rest = split(unit_formats(denoiser, **formats), block)
    state, report = fit(denoiser.model, calibration, own, ranges, config)
    return state, report, rest


def built(family: str, calibrated: Calibrated, states: list[UnitState]) -> nn.Module:
    model = calibrated(family, 2)[0].model
    build_quantized(model, merge_formats(states))
    load_states(model, states)
    return model


def test_the_finite_set_is_every_step_with_every_label(calibrated: Calibrated) -> None:
    denoiser, calibration = calibrated("unet", 2)
    finite = enumerate_set(denoiser.model, calibration)
    assert (finite.steps, finite.variants, finite.labels) == (3, 5, 5)
    assert all(len(x) == 15 for x in (*finite.inputs.values(), *finite.outputs.values()))
    # Rows are what the model computes for that step and label, whatever the sample.
    seen: dict[str, Tensor] = {}
    name = finite.features()[-1]
    denoiser.model.get_submodule(name).register_forward_hook(lambda _, a, y: seen.update({name: y.clone()}))
    with torch.no_grad():
        denoiser.model(torch.randn(1, 3, 8, 8), calibration.timesteps[2], torch.tensor([3]))
    assert torch.allclose(seen[name][0], finite.outputs[name][2 * 5 + 3], atol=1e-6)
    # A transformer's guidance has one label more; continuous conditions are the calibration set's.
    denoiser, calibration = calibrated("dit", 2)
    assert enumerate_set(denoiser.model, calibration).labels == 7
    denoiser, calibration = calibrated("sdxl_unet", 2)
    finite = enumerate_set(denoiser.model, calibration)
    assert finite.labels is None
    assert finite.variants <= 2


def noise(report: TemporalReport) -> float:
    return sum(10 ** (-feature["sqnr_db"] / 10) for feature in report.features.values())


@pytest.mark.parametrize("family", [pytest.param("digits", marks=pytest.mark.slow), "sd3"])
def test_each_way_of_rounding_is_at_least_as_near_as_the_one_before(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    nearest = fitted(family, calibrated, unit_formats, CLOSED.replaced(method=TemporalRounding.NEAREST))[1]
    closed = fitted(family, calibrated, unit_formats)[1]
    learned = fitted(family, calibrated, unit_formats, TemporalFit(iterations=20))[1]
    assert noise(learned) <= noise(closed) < 0.5 * noise(nearest)
    for feature in learned.features.values():
        assert feature["served"] == "layer"
        assert feature["cosine"] > 0.999


def test_reconstruction_brings_features_nearer(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    state = fitted("unet", calibrated, unit_formats, CLOSED.replaced(method=TemporalRounding.NEAREST), bits=3)[0]
    denoiser, calibration = calibrated("unet", 2)
    finite = enumerate_set(denoiser.model, calibration)
    weights = {name: denoiser.model.get_parameter(f"{name}.weight").detach() for name in finite.layers}
    parts = build_quantized(denoiser.model, merge_formats([state]))
    load_states(denoiser.model, [state])

    def power() -> float:
        with torch.no_grad():
            outputs = finite.run(denoiser.model, parts)
        return sum(feature_error(outputs[name], finite.outputs[name]).power for name in finite.features())

    correct_biases(finite, denoiser.model, parts)
    start = power()
    reconstruct(finite, denoiser.model, parts, weights, TemporalFit(iterations=150, trust=0.0))
    assert power() < 0.6 * start
    assert all(layer.soft_weight is None for layer in parts.layers.values())


def test_a_reconstruction_that_gains_nothing_is_not_taken(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    closed = fitted("unet", calibrated, unit_formats)[0]
    # Its only iteration moves every weight to the other code.
    wild = fitted("unet", calibrated, unit_formats, TemporalFit(iterations=1, lr=1e3))[0]
    assert closed.to_bytes() == wild.to_bytes()


def test_ranges_are_those_of_each_step(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    state = fitted("unet", calibrated, unit_formats)[0]
    denoiser, calibration = calibrated("unet", 2)
    finite = enumerate_set(denoiser.model, calibration)
    name = "mid_block.resnets.0.time_emb_proj"
    scale, zero = (state.tensors[f"{name}.act_quantizers.0.{key}"] for key in ("scale", "zero_point"))
    rows = finite.inputs[name].reshape(3, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    assert torch.allclose(scale, (high - low) / 255)
    assert torch.equal(zero, torch.round(-low / scale))
    static = fitted("unet", calibrated, unit_formats, activation=ActivationSpec(8, mode=ActivationMode.STATIC))[0]
    assert static.tensors[f"{name}.act_quantizers.0.scale"].shape == (1,)
    assert static.timesteps == ()


def test_tables_stand_for_the_whole_block_where_labels_can_be_listed(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    state, report, _ = fitted("digits", calibrated, unit_formats, CLOSED.replaced(cache=True))
    formats = state.formats
    assert formats.layers == {}
    assert set(formats.unserved) == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert set(formats.features.values()) <= {FeatureSpec(8, 10), FeatureSpec(16, 10)}
    assert report.unserved == list(formats.unserved)
    assert report.table_bytes == sum(t.numel() * t.element_size() for t in state.tensors.values())
    for feature in report.features.values():
        assert feature["served"].startswith("table")
        assert feature["sqnr_db_table"] > feature["sqnr_db"]
    assert UnitState.from_bytes(state.to_bytes()).formats == formats


def test_the_size_rule_decides_the_format(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    def bits(ratio: float) -> tuple[set[int], float]:
        config = CLOSED.replaced(cache=True, cache_ratio=ratio)
        state, report, _ = fitted("digits", calibrated, unit_formats, config)
        return {spec.bits for spec in state.formats.features.values()}, report.table_bytes / report.replaced_bytes

    wide, most = bits(1e9)
    assert wide == {16}
    narrow, least = bits(0.99 * most)
    assert narrow == {8}
    # Below that, what depends on the timestep alone is still tabled: the time MLP's output, for each step.
    config = CLOSED.replaced(cache=True, cache_ratio=0.99 * least)
    state, report, _ = fitted("digits", calibrated, unit_formats, config)
    assert state.formats.features == {"time_embedding.linear_2": FeatureSpec(16)}
    assert state.formats.unserved == ("time_embedding.linear_1",)
    assert report.table_bytes < report.replaced_bytes
    state, _, _ = fitted("digits", calibrated, unit_formats, config.replaced(cache_ratio=1e-9))
    assert state.formats.features == {}


def test_continuous_conditions_leave_the_timesteps_own_features(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    config = CLOSED.replaced(cache=True, cache_ratio=10.0)
    assert set(fitted("sdxl_unet", calibrated, unit_formats, config)[0].formats.features) == {"time_embedding.linear_2"}
    # PixArt's embedding is read by a layer of the block and by the last norm.
    state = fitted("pixart", calibrated, unit_formats, config)[0]
    assert set(state.formats.features) == {"adaln_single.emb.timestep_embedder.linear_2"}
    assert set(state.formats.layers) == {"adaln_single.linear"}
    # Without any condition, every feature is a row for each step.
    state = fitted("text_unet", calibrated, unit_formats, config)[0]
    assert {spec.labels for spec in state.formats.features.values()} == {1}
    assert not state.formats.layers


def test_a_feature_comes_from_its_layer_where_that_is_nearer(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    # 8-bit weights without activation quantization are nearer than 8-bit tables for some channels or none; at 16 bits
    # no table of this block is farther than 2-bit weights.
    coarse = fitted("digits", calibrated, unit_formats, CLOSED.replaced(cache=True), bits=2)[1]
    assert all(feature["served"].startswith("table") for feature in coarse.features.values())
    config = CLOSED.replaced(cache=True, cache_ratio=0.7)
    state, report, _ = fitted("digits", calibrated, unit_formats, config, bits=8, activation=None)
    for name, feature in report.features.items():
        assert (name in state.formats.layers) == (feature["served"] == "layer")
        if "sqnr_db_table" in feature:
            assert feature["sqnr_db_table"] > feature["sqnr_db"]
    assert set(state.formats.layers) | set(state.formats.features) | set(state.formats.unserved) >= set(report.features)


#: Labels, continuous conditions, and both kinds of transformers' modulation; the others repeat them.
QUICK = ("unet", "sdxl_unet", "pixart", "sd3")
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in ("unet", "text_unet", "sdxl_unet", "dit", "pixart", "sd3", "flux", "digits")
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loaded_equals_simulated_and_mixed_steps_equal_each_alone(
    family: str, calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    with torch.enable_grad():
        config = TemporalFit(iterations=2, cache=True, cache_ratio=50.0)
        temporal, _, rest = fitted(family, calibrated, unit_formats, config)
    denoiser, calibration = calibrated(family, 2)
    states = [temporal, *(each.state for each in round_units(denoiser.model, calibration, rest, rounding()))]
    simulated = built(family, calibrated, states)
    folder = tmp_path / "packed"
    base = json.loads(calibrated(family, 2)[0].model.to_json_string())
    write_artifact(simulated, base, quantization_config(merge_formats(states)), None, folder)
    loaded = quant_core.load_quantized(folder, device="cpu", backend="reference")

    everything = calibration.gather(torch.arange(len(calibration)))
    mixed = replay(loaded, everything)
    assert torch.equal(mixed, replay(simulated, everything))
    for step in range(calibration.steps):
        # Rows of one step, in a batch of the same size and order, so that only the tables can make a difference.
        alone = torch.arange(len(calibration)) % calibration.samples + step * calibration.samples
        rows = everything.step == step
        assert torch.equal(mixed[rows], replay(loaded, calibration.gather(alone))[rows])
    with pytest.raises(UnknownTimestepError):
        replay(loaded, Batch(everything.x, everything.timestep + 0.37, everything.step, everything.conditioning))
    with pytest.raises(ArtifactError, match=r"got a table of its outputs .*passes\.temporal\.cache"):
        dequantized_state(loaded)


@torch.no_grad()
def test_the_block_costs_a_look_up(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    state = fitted("digits", calibrated, unit_formats, CLOSED.replaced(cache=True))[0]
    model = built("digits", calibrated, [state])
    denoiser, calibration = calibrated("digits", 2)
    finite = enumerate_set(denoiser.model, calibration)
    # No weight of the block is there any more, and its features are those of full precision but for rounding.
    assert not any(name in model.state_dict() for name in (f"{layer}.qweight" for layer in finite.layers))
    assert not any(f"{layer}.weight" in model.state_dict() for layer in finite.layers)
    for name in finite.features():
        seen: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(lambda _, a, y, seen=seen: seen.append(y.clone()))
        replay(model, calibration.rows(1, 0, 2))
        handle.remove()
        rows = [10 + int(label) for label in calibration.conditioning["class_labels"][:2]]
        assert feature_error(seen[0], finite.outputs[name][rows]).sqnr_db > 35
    inspection, model_format = inspect_model(calibrated("digits", 2)[0]), merge_formats([state])
    cost, plain = model_cost(inspection, model_format), model_cost(inspection, merge_formats([]))
    saved = sum(inspection["layers"][name]["macs"] for name in finite.layers)
    assert plain.bops - cost.bops == saved * 32 * 32
    assert cost.bops_fp32 == plain.bops_fp32


@torch.no_grad()
def test_unknown_labels_and_steps(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    state = fitted(
        "unet",
        calibrated,
        unit_formats,
        CLOSED.replaced(method=TemporalRounding.NEAREST, cache=True, cache_ratio=50.0),
    )[0]
    model = built("unet", calibrated, [state])
    timesteps, x = calibrated("unet", 2)[1].timesteps, torch.randn(2, 3, 8, 8)
    with pytest.raises(ConditioningError, match=r"class_labels: got \[1, 5\], wanted labels 0 to 4"):
        model(x, timesteps[0], torch.tensor([1, 5]))
    near = calibrated("unet", 2)[0].model
    build_quantized(near, merge_formats([state], UnknownTimestep.NEAREST))
    load_states(near, [state])
    labels = torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="using the nearest step"):
        between = near(x, timesteps[0] + 0.4, labels, return_dict=False)[0]
    assert torch.equal(between, model(x, timesteps[0], labels, return_dict=False)[0])


def test_other_units_are_reconstructed_with_the_block_as_it_is(
    calibrated: Calibrated, unit_formats: ChooseFormats, tmp_path: Path
) -> None:
    for cache in (False, True):
        config = CLOSED.replaced(method=TemporalRounding.NEAREST, cache=cache)
        temporal, _, rest = fitted("digits", calibrated, unit_formats, config, bits=2)
        denoiser, calibration = calibrated("digits", 2)
        rounded = {s.state.formats.unit: s.state for s in round_units(denoiser.model, calibration, rest, rounding())}
        start = rounded["mid_block.resnets.0"]
        learn = reconstruction(
            iterations=3, batch_size=4, trust=0.0, learn_activation_scales=True, start=StartCodes.NEAREST
        )
        (tmp_path / str(cache)).mkdir()
        made = reconstruct_unit(
            calibrated("digits", 2)[0].model, calibration, start, [], learn, tmp_path / str(cache), temporal
        )
        alone = reconstruct_unit(calibrated("digits", 2)[0].model, calibration, start, [], learn, tmp_path / str(cache))
        assert set(made.state.tensors) == set(start.tensors)
        assert not any("time_emb_proj" in name for name in made.state.tensors)
        # A block at 2 bits is felt inside the unit.
        assert made.sqnr_db_before != alone.sqnr_db_before
        assert (made.sqnr_db_before < alone.sqnr_db_before) or cache
