from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.packing import unpack_codes
from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.denoiser import Denoiser
from quant_core.fit.hessian import input_rows
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.fit.rounding import RoundedUnit, UnitRanges, read_unit, round_units
from quant_core.fit.unit_state import load_states, merge_formats
from quant_core.nn.layers import weight_groups, weight_matrix
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import choose_qparams
from quant_spec.enums import ActivationMode
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec, UnitFormat, WeightSpec
from quant_spec.planned import PlannedActivation, PlannedLayer, PlannedUnit
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.round import Params
from tests.quant_core.params import ALL, rounding

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]
Units = list[tuple[UnitFormat, UnitRanges]]
ChooseFormats = Callable[..., Units]

CLOSED = rounding("closed_form")
NEAREST = rounding()


def rounded(
    calibrated: Calibrated, unit_formats: ChooseFormats, config: Params, pick: slice = slice(None), **formats: object
) -> list[RoundedUnit]:
    denoiser, calibration = calibrated("digits")
    units = unit_formats(denoiser, **formats)[pick]
    return round_units(denoiser.model, calibration, units, config)


def weight_of(unit: RoundedUnit, name: str) -> Tensor:
    """A layer's weight matrix, from the tensors of its state."""
    spec = unit.state.formats.layers[name]
    packed, scale, zero = (unit.state.tensors[f"{name}.{key}"] for key in ("qweight", "scale", "zero_point"))
    columns = packed.shape[1] * 8 // spec.weight.bits
    groups = torch.zeros(columns, dtype=torch.long)
    if spec.split is not None:
        groups = weight_groups((1, sum(spec.split), columns // sum(spec.split)), spec)
    codes = unpack_codes(packed, spec.weight.bits, columns).float()
    return (codes - zero.float()[:, groups]) * scale.float()[:, groups]


def test_every_unit_gets_a_state(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("digits")
    units = unit_formats(denoiser)
    made = round_units(denoiser.model, calibration, units, NEAREST)
    assert [each.state.formats for each in made] == [formats for formats, _ in units]
    for each in made:
        assert each.state.timesteps == tuple(calibration.timesteps.tolist())
        assert each.layer_sqnr_db.keys() == each.state.formats.layers.keys()
        # 4 bits per channel
        assert all(10 < db < 35 for db in each.layer_sqnr_db.values())


def test_nearest_codes_are_the_nearest(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    float_model = calibrated("digits")[0].model
    first = rounded(calibrated, unit_formats, NEAREST, slice(1))[0]
    for layer in first.state.formats.layers:
        matrix = weight_matrix(float_model.get_parameter(f"{layer}.weight").detach())
        grid = choose_qparams(matrix, 4, symmetric=False, spec=RangeSpec())
        assert torch.equal(first.state.tensors[f"{layer}.scale"][:, 0], grid.scale)
        steps = (weight_of(first, layer) - matrix).abs() / grid.scale[:, None]
        assert float(steps.max()) <= 1.0  # half a step, and as much where the zero point was rounded
        assert float(steps.mean()) < 0.3


@pytest.mark.parametrize("config", [NEAREST, CLOSED], ids=["nearest", "closed_form"])
def test_a_units_state_does_not_depend_on_its_group(
    calibrated: Calibrated, unit_formats: ChooseFormats, config: Params
) -> None:
    config = config.replaced(positions=6, samples=3, forward_batch_size=2)
    formats = {"activation_range": "mse", "weight_range": "mse", "bits": 3}
    together = rounded(calibrated, unit_formats, config, slice(4, 9), **formats)
    alone = [rounded(calibrated, unit_formats, config, slice(i, i + 1), **formats)[0] for i in range(4, 9)]
    assert any(each.state.formats.attentions for each in together)
    for one, two in zip(together, alone, strict=True):
        assert one.state.to_bytes() == two.state.to_bytes(), one.state.formats.unit
        assert one.layer_sqnr_db == two.layer_sqnr_db


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    config = CLOSED.replaced(positions=4)
    one, two, other = (
        rounded(calibrated, unit_formats, config.replaced(seed=seed), slice(3, 4))[0].state.to_bytes()
        for seed in (0, 0, 1)
    )
    assert one == two
    assert one != other


def test_closed_form_beats_nearest_at_every_layers_output(calibrated: Calibrated, unit_formats: ChooseFormats) -> None:
    denoiser, calibration = calibrated("digits")
    units = unit_formats(denoiser, bits=4)
    picked = units[2:7]
    states = {
        config.method: round_units(calibrated("digits")[0].model, calibration, picked, config)
        for config in (NEAREST, CLOSED.replaced(positions=ALL))
    }
    inputs: dict[str, list[Tensor]] = {}
    for formats, _ in picked:
        for name in formats.layers:
            inputs[name] = []
            denoiser.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: inputs[name].append(args[0])
            )
    with torch.no_grad():
        for batch in calibration.by_step(4):
            replay(denoiser.model, batch)
    gains = []
    for near, closed in zip(*states.values(), strict=True):
        for name in near.state.formats.layers:
            layer = denoiser.model.get_submodule(name)
            rows = input_rows(layer, torch.cat(inputs[name]), None, torch.Generator())
            matrix = weight_matrix(layer.get_parameter("weight").detach())
            errors = [
                float((rows @ (matrix - weight_of(unit, name)).T - moved_bias(unit, name, layer)).square().sum())
                for unit in (near, closed)
            ]
            gains.append(10 * torch.log10(torch.tensor(errors[0] / errors[1])).item())
            # the figure that is reported is the one at the output
            signal = float((rows @ matrix.T).square().sum())
            reported = 10 ** (closed.layer_sqnr_db[name] / 10)
            assert reported == pytest.approx(signal / errors[1], rel=0.02)
    assert min(gains) > 0.5
    assert sum(gains) / len(gains) > 3


def moved_bias(unit: RoundedUnit, name: str, layer: nn.Module) -> Tensor:
    """What rounding added to a layer's bias."""
    bias = unit.state.tensors.get(f"{name}.bias")
    return torch.zeros(()) if bias is None else bias - layer.get_parameter("bias").detach()


def test_a_bias_takes_the_mean_error_and_codes_are_those_of_the_rest(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits")
    name = "down_blocks.1.resnets.0.conv2"
    unit = next(each for each in unit_formats(denoiser, bits=2) if name in each[0].layers)
    config = CLOSED.replaced(positions=ALL)
    kept, corrected = (
        round_units(calibrated("digits")[0].model, calibration, [unit], each)[0]
        for each in (config, config.replaced(correct_bias=True))
    )
    layer, seen = denoiser.model.get_submodule(name), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in calibration.by_step(4):
            replay(denoiser.model, batch)
    rows = input_rows(layer, torch.cat(seen), None, torch.Generator())
    matrix = weight_matrix(layer.get_parameter("weight").detach())
    assert torch.equal(kept.state.tensors[f"{name}.bias"], layer.get_parameter("bias"))
    errors = [rows @ (matrix - weight_of(made, name)).T - moved_bias(made, name, layer) for made in (kept, corrected)]
    spread = float(errors[1].std())
    assert float(errors[1].mean(dim=0).abs().max()) < 0.01 * spread
    assert float(moved_bias(corrected, name, layer).abs().max()) > 0.05 * spread
    # Codes are chosen for what the bias can't take: less is left than of the others' error without its mean.
    assert float(errors[1].square().sum()) < float((errors[0] - errors[0].mean(dim=0)).square().sum())


@pytest.mark.parametrize("mode", list(ActivationMode))
def test_activation_tables_by_mode(calibrated: Calibrated, unit_formats: ChooseFormats, mode: ActivationMode) -> None:
    denoiser, calibration = calibrated("digits")
    spec = ActivationSpec(8, mode=mode)
    unit = next(unit for unit in unit_formats(denoiser, activation=spec) if unit[0].attentions)
    (made,) = round_units(denoiser.model, calibration, [unit], NEAREST)
    tables = {name: t for name, t in made.state.tensors.items() if "quantizer" in name}
    assert made.state.timesteps == ((*calibration.timesteps.tolist(),) if mode is ActivationMode.PER_STEP else ())
    if spec.is_dynamic:
        assert not tables
        return
    assert {len(table) for table in tables.values()} == {3 if mode is ActivationMode.PER_STEP else 1}
    assert len(tables) == 2 * (len(made.state.formats.layers) + 4 * len(made.state.formats.attentions))
    assert all(bool((t != 1).all()) for name, t in tables.items() if name.endswith("scale"))


def test_a_split_input_has_a_range_and_scales_for_each_part(
    calibrated: Calibrated, unit_formats: ChooseFormats
) -> None:
    denoiser, calibration = calibrated("digits")
    formats, ranges = next(u for u in unit_formats(denoiser) if any(s.split for s in u[0].layers.values()))
    (made,) = round_units(denoiser.model, calibration, [(formats, ranges)], NEAREST)
    name = next(name for name, spec in formats.layers.items() if spec.split)
    one, two = (made.state.tensors[f"{name}.act_quantizers.{part}.scale"] for part in range(2))
    assert not torch.equal(one, two)
    assert made.state.tensors[f"{name}.scale"].shape[1] == 2


@pytest.mark.parametrize("config", [NEAREST, CLOSED], ids=["nearest", "closed_form"])
def test_eight_bits_leave_the_model_nearly_as_it_was(
    calibrated: Calibrated, unit_formats: ChooseFormats, config: Params
) -> None:
    denoiser, calibration = calibrated("digits")
    batch = calibration.rows(1, 0, 4)
    with torch.no_grad():
        wanted = replay(denoiser.model, batch)
    states = [each.state for each in round_units(denoiser.model, calibration, unit_formats(denoiser, bits=8), config)]
    fresh = calibrated("digits")[0].model
    build_quantized(fresh, merge_formats(states))
    load_states(fresh, states)
    with torch.no_grad():
        got = replay(fresh, batch)
        left = replay(denoiser.model, batch)
    assert torch.equal(got, left)  # the model that was rounded has the same numbers
    assert 0 < float((got - wanted).norm()) < 0.05 * float(wanted.norm())


@pytest.mark.parametrize(
    ("weight", "shape"),
    [({"granularity": "per_tensor"}, (1, 1)), ({}, (6, 1)), ({"granularity": "per_group", "group_size": 4}, (6, 3))],
)
def test_weight_grids(weight: dict[str, object], shape: tuple[int, int]) -> None:
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    spec = LayerSpec(WeightSpec(4, **weight))  # type: ignore[arg-type]
    groups = weight_groups((6, 10), spec)
    grid = weight_grid(matrix, spec, groups, RangeSpec())
    assert grid.scale.shape == grid.zero_point.shape == shape
    for row in range(6):
        for group in range(shape[1]):
            own = matrix if shape == (1, 1) else matrix[row, groups == group]
            wanted = (own.max().clamp(min=0) - own.min().clamp(max=0)) / 15
            # scales per group are kept in half the bytes
            tolerance = 2**-8 if shape[1] == 3 else 1e-6
            assert grid.scale[min(row, shape[0] - 1), group].item() == pytest.approx(wanted.item(), rel=tolerance)
    codes = nearest_codes(matrix, grid, 4, groups)
    back = (codes.float() - grid.zero_point[:, groups]) * grid.scale[:, groups]
    assert float(((back - matrix).abs() / grid.scale[:, groups]).max()) <= 1.05


def test_read_unit_takes_a_planned_unit_apart() -> None:
    data: dict[str, Any] = {
        "unit": "block",
        "layers": {
            "block.a": {
                "weight": {"bits": 4, "symmetric": False, "granularity": "per_channel", "group_size": None},
                "weight_range": {"method": "mse"},
                "activation": {"bits": 8, "symmetric": False, "mode": "per_step"},
                "activation_range": {"method": "percentile", "percentile": 0.99},
                "split": [3, 5],
            },
            "block.b": {
                "weight": {"bits": 8},
                "weight_range": {"method": "minmax"},
                "activation": None,
                "activation_range": None,
                "split": None,
            },
        },
        "attentions": {
            "block.c": {
                "activation": {"bits": 8, "mode": "static"},
                "activation_range": {"method": "minmax"},
                "softmax_bits": 6,
            }
        },
    }
    formats, ranges = read_unit(PlannedUnit.from_json(data))
    assert (formats.unit, list(formats.layers), list(formats.attentions)) == (
        "block",
        ["block.a", "block.b"],
        ["block.c"],
    )
    assert formats.layers["block.a"].split == (3, 5)
    assert formats.layers["block.b"].activation is None
    assert formats.attentions["block.c"].softmax_bits == 6
    assert ranges.weights["block.a"].method == "mse"
    assert ranges.activations == {"block.a": RangeSpec("percentile", 0.99), "block.c": RangeSpec()}  # type: ignore[arg-type]


def test_read_unit_fills_in_the_bits_of_each_step_where_they_are_open() -> None:
    fixed, opened = (
        PlannedLayer(WeightSpec(4), RangeSpec(), PlannedActivation(bits), RangeSpec()) for bits in (6, None)
    )
    planned = PlannedUnit("block", {"fixed": fixed, "open": opened}, {})
    layers = read_unit(planned, (4, 8, 6))[0].layers
    assert layers["fixed"].activation == ActivationSpec(6)
    assert layers["open"].activation == ActivationSpec(8, step_bits=(4, 8, 6))
    with pytest.raises(QuantizationError, match="activation: got null bits, wanted a number"):
        read_unit(planned)
