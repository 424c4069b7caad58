"""The comparison of ways of rounding: what each way minimises, and that all are measured on samples of a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import rounding_fits as fits
from benchmarks import rounding_variants
from quant_core.fit.hessian import input_rows
from quant_core.nn.layers import QuantLayer, weight_from_matrix, weight_matrix
from quant_core.nn.model import build_quantized
from quant_spec.enums import ActivationMode
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.ranges import RangeSpec

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits"
W4A8 = LayerSpec(WeightSpec(4), ActivationSpec(8, mode=ActivationMode.DYNAMIC_TOKEN))
W4A4 = LayerSpec(WeightSpec(4), ActivationSpec(4, mode=ActivationMode.DYNAMIC_TOKEN))


def quantized(layer: nn.Module, spec: LayerSpec) -> QuantLayer:
    """Return a layer in a format, codes still zero."""
    return build_quantized(nn.Sequential(copy.deepcopy(layer)), ModelFormat({"0": spec}, {}, ())).layers["0"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", fits.GROUPS)
def test_rotation_is_orthonormal_with_equal_sums(order: int) -> None:
    matrix = fits.regular_hadamard(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order))
    torch.testing.assert_close(matrix.sum(1), torch.ones(order))


def test_rotation_of_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match="got 32, wanted a power of 4"):
        fits.regular_hadamard(32)


@pytest.mark.parametrize("dim", [1, -1], ids=["convolution", "linear"])
def test_rotated_layer_is_exact_in_float(dim: int) -> None:
    layer: nn.Module = nn.Conv2d(32, 5, 3, padding=1) if dim == 1 else nn.Linear(32, 5)
    x = normal(2, 32, 6, 6) if dim == 1 else normal(2, 7, 32)
    weight = layer.get_parameter("weight")
    expected = layer(x)
    weight.data = weight_from_matrix(fits.rotate(weight_matrix(weight.data), 16), tuple(weight.shape))
    torch.testing.assert_close(layer(fits.rotate_channels(x, 16, dim)), expected)


def test_group_divides_every_part_of_an_input() -> None:
    assert fits.group_of(W4A8, 192, 256) == 64
    assert fits.group_of(W4A8, 24, 256) == 1
    assert fits.group_of(LayerSpec(WeightSpec(4), None, split=(64, 48)), 112, 256) == 16


def seen_of(layer: nn.Linear, x: Tensor) -> fits.Seen:
    """Return what is seen of one step's input rows (rows, K), each a sample of its own."""
    seen = fits.Seen({"plain": x.T @ x / len(x)}, rows=[x], samples=[torch.arange(len(x))])
    seen.steps = [torch.zeros(len(x), dtype=torch.long)]
    for group in (1, 16):
        turned = fits.rotate(x, group)
        seen.low[group], seen.high[group] = [turned.amin(1)[:, None]], [turned.amax(1)[:, None]]
    return seen


def test_rotation_lowers_the_output_error_where_a_channel_is_an_outlier() -> None:
    layer = nn.Linear(32, 16)
    x = normal(200, 32)
    x[:, 3] *= 30
    found, errors = seen_of(layer, x), {}
    for group in (1, 16):
        made = quantized(layer, W4A4)
        fit = fits.fit_layer(made, layer.weight, found.moments["plain"], found, RangeSpec(), group)
        fits.set_fit(made, fit)
        errors[group] = fits.output_error(made, layer.weight, fit, found)
        with torch.no_grad():
            difference = made(x) - layer(x)
        assert float(difference.square().mean()) == pytest.approx(errors[group], rel=1e-4)
    assert errors[16] < 0.5 * errors[1]


def test_rotated_convolution_runs_as_it_was_fitted() -> None:
    layer = nn.Conv2d(32, 8, 3, padding=1)
    x = normal(4, 32, 6, 6)
    x[:, 3] *= 30
    rows = input_rows(layer, x, None, torch.Generator())
    turned = fits.rotate_channels(x, 16, 1).flatten(1)
    seen = fits.Seen(
        {"plain": rows.T @ rows / len(rows)},
        {16: [turned.amin(1)[:, None]]},
        {16: [turned.amax(1)[:, None]]},
        [rows],
        [torch.zeros(len(rows), dtype=torch.long)],
        [torch.arange(4).repeat_interleave(36)],
    )
    made = quantized(layer, W4A4)
    fit = fits.fit_layer(made, layer.weight, seen.moments["plain"], seen, RangeSpec(), 16)
    fits.set_fit(made, fit)
    with torch.no_grad():
        difference = made(x) - layer(x)
    expected = fits.output_error(made, layer.weight, fit, seen)
    assert float(difference.square().mean()) == pytest.approx(expected, rel=1e-4)


def test_each_weighting_is_best_by_its_own_weights() -> None:
    layer = nn.Linear(32, 64)
    early, late = normal(500, 32) @ normal(32, 32, seed=1), normal(500, 32) @ normal(32, 32, seed=2)
    first, last = early.T @ early, late.T @ late
    moments = {"first": 100 * first + last, "last": first + 100 * last}
    errors = {}
    for way, moment in moments.items():
        made = quantized(layer, W4A8)
        fit = fits.fit_layer(made, layer.weight, moment, seen_of(layer, early), RangeSpec())
        error = fit.weight - layer.weight.detach()
        errors[way] = {by: float(((error @ weight) * error).sum()) for by, weight in moments.items()}
    assert errors["first"]["first"] < errors["last"]["first"]
    assert errors["last"]["last"] < errors["first"]["last"]


def test_ways_are_compared_on_samples_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "variants.json"
    words = ["--model", str(DIGITS), "--seeds", "2", "--calibration", "2", "--steps", "2", "--out", str(out)]
    ways = ["steps: gain", "steps: power"]
    rotation = ["--formats", "W4A4 by token", "--groups", "16", "0"]
    for more in (["--parts", "weights", "--ways", *ways], ["--parts", "rotation", *rotation]):
        monkeypatch.setattr("sys.argv", ["rounding_variants", *words, *more])
        rounding_variants.main()
    found = json.loads(out.read_text())["models"]["digits"]
    rows = found["rows"]
    assert list(rows) == ["plain", *ways, *(f"W4A4 by token: {way}" for way in ("none", "groups of 16", "best of all"))]
    assert len({row["psnr_db"] for row in rows.values()}) == len(rows)
    assert all(row["psnr_db"] > 15 for row in rows.values())
    assert found["gains"]["gains"][0] > found["gains"]["gains"][-1]
    assert 0 < rows["W4A4 by token: groups of 16"]["rotated"] <= rows["W4A4 by token: best of all"]["rotated"]
