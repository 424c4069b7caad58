"""The formats of transformers, from the command line to a loaded model: low-rank branches, FP8, weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quant_core
from kernels.conv import ConvGeometry
from kernels.cpu_weight import sums_pairs_exactly
from kernels.packing import unpack_codes
from kernels.weights import weight_integers
from quant_core.nn.attention import AttentionQuantizer
from quant_core.nn.feature_table import FeatureTable
from quant_core.nn.layers import QuantLayer, weight_matrix
from quant_core.runtime.parts import lay_out_parts
from quant_spec.enums import KernelBackend
from quant_spec.formats import ModelFormat, WeightSpec
from quant_spec.quantization_config import parse_quantization_config

Cli = Callable[..., Any]

SMALL = (
    "sampler.num_inference_steps=2",
    "calibration={seeds: 2, batch_size: 2}",
    "evaluation={seeds: 2, sqnr_seeds: 2, grid: 2}",
    "passes.round={samples: 2, positions: 4}",
)
#: A few layers, whose rounding takes no time.
FEW = 'layers=[{match: "*", keep: true}, {match: "mid_block.*"}, {match: "time_embedding.*"}]'
#: Any convolution's geometry: weights are laid out alike for all.
LIKE = ConvGeometry((3, 3))
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(cli: Cli, recipe: str, *more: str) -> dict[str, Any]:
    """Quantize the small model; return its release's view."""
    words = [word for each in (*SMALL, *more) for word in ("--set", each)]
    view: dict[str, Any] = cli("run", recipe, "--model", "digits", *words, "--json").json
    assert (view["state"], view["error"]) == ("succeeded", None), view["error"]
    return view


def predict(model: nn.Module) -> torch.Tensor:
    """Call the small model at the first of two steps."""
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(x, torch.tensor(500), class_labels=torch.tensor([1, 7])).sample
    return out


def load_everywhere(cli: Cli, view: dict[str, Any], folder: Path) -> nn.Module:
    """Pull a release, load it each way, save it again; all are one model. Return that of plain diffusers."""
    assert cli("artifacts", "pull", view["release"], folder).code == 0
    plain = diffusers.UNet2DModel.from_pretrained(folder)
    want = predict(plain)
    assert torch.equal(predict(quant_core.load_quantized(folder, backend="reference")), want)
    got = predict(quant_core.load_quantized(folder, backend="cpu"))
    assert float((got - want).norm() / want.norm()) < 2e-2
    plain.save_pretrained(folder / "again")
    assert (folder / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert torch.equal(predict(diffusers.UNet2DModel.from_pretrained(folder / "again")), want)
    return plain


def layers_of(model: nn.Module) -> dict[str, QuantLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def format_of(folder: Path) -> ModelFormat:
    return parse_quantization_config(json.loads((folder / "config.json").read_text())["quantization_config"])


def check_export(cli: Cli, view: dict[str, Any], model: nn.Module, folder: Path) -> None:
    """A release's float16 weights are what its layers stand for, branches and all."""
    assert cli("artifacts", "export", view["release"], "--format", "dequantized", "--out", folder).code == 0
    exported = diffusers.UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    for name, layer in layers_of(model).items():
        wanted = layer.unscaled(layer.weight)
        torch.testing.assert_close(exported.get_parameter(f"{name}.weight"), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_low_rank_branches_reach_release_listing_and_export(cli: Cli, tmp_path: Path) -> None:
    view = run(cli, "svdquant-w4a8", FEW, "passes.low_rank={rank: 4, convolutions: true, samples: 2, positions: 4}")
    model = load_everywhere(cli, view, tmp_path / "release")
    check_export(cli, view, model, tmp_path / "float")
    layers = layers_of(model)
    branched = {name for name, layer in layers.items() if layer.spec.low_rank}
    assert branched
    assert set(layers) == branched
    assert any(layers[name].spec.channel_scale for name in branched)  # smoothed
    name = min(branched)
    tensors = load_file(tmp_path / "release" / WEIGHTS)
    assert tensors[f"{name}.low_rank_up"].dtype == torch.bfloat16
    shown = {
        each["layer"]: each for each in cli("artifacts", "show", view["release"], "--layers", "--json").json["layers"]
    }
    assert shown[name]["bits"]["low_rank"] == layers[name].spec.low_rank
    assert "4 per_group of 32, integer scales + rank 4 " in cli("artifacts", "show", view["release"], "--layers").out
    # a branch costs bits
    held = {name: layer.spec.low_rank * (layer.shape[0] + layer.columns) * 16 for name, layer in layers.items()}
    sizes = {name: layer.shape[0] * layer.columns for name, layer in layers.items()}
    bits = sum(held.values()) + sum(layer.spec.weight.bits * sizes[name] for name, layer in layers.items())
    plain = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    rest = sum(module.weight.numel() for module in plain.values())
    mean = (bits + 32 * rest) / (sum(sizes.values()) + rest)
    assert view["metrics"]["weight_bits_mean"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_integer_scales_of_groups_reach_release_listing_and_kernels(cli: Cli, tmp_path: Path) -> None:
    """What is in the file is one int8 matrix on every backend; releases with float scales load too, and are larger."""
    groups = "weights={bits: 4, granularity: per_group, group_size: 32, group_scale: integer, range: mse}"
    view = run(cli, "fast-w4a8", FEW, groups)
    model = load_everywhere(cli, view, tmp_path / "release")
    check_export(cli, view, model, tmp_path / "float")
    tensors = load_file(tmp_path / "release" / WEIGHTS)
    shown = cli("artifacts", "show", view["release"], "--layers").out
    assert "4 per_group of 32, integer scales" in shown
    runs = {run.layer: run for run in quant_core.layer_runs(quant_core.load_quantized(tmp_path / "release"))}
    largest = 0
    for name, layer in layers_of(model).items():
        assert layer.spec.weight.is_multiplied, name
        count = layer.zero_point.shape[1]
        codes = unpack_codes(tensors[f"{name}.qweight"], 4, layer.columns).int()
        zero, less = (unpack_codes(tensors[f"{name}.{part}"], 4, count).int() for part in ("zero_point", "multiplier"))
        integers = (codes - zero[:, layer.group_index]) * (less + 1)[:, layer.group_index]
        assert -128 <= int(integers.min()) <= int(integers.max()) <= 127
        largest = max(largest, int(integers.abs().max()))
        scale = tensors[f"{name}.scale"]
        assert torch.equal(weight_matrix(layer.weight), integers.float() * scale)
        (part,) = lay_out_parts(layer, KernelBackend.TRITON, None if layer.kind is nn.Linear else LIKE, unpacked=True)
        assert isinstance(part.weight, tuple)
        if count > 1:  # one multiplier of a row is in its scale
            assert torch.equal(weight_integers(part.weight[0]).flatten(1), integers)
            assert torch.equal(part.weight[0].scale, scale)
        assert not sums_pairs_exactly() or "8-bit weights unpacked from fewer bits in " in runs[name].reason
    assert largest > 100
    floats = run(cli, "fast-w4a8", FEW, groups.replace("integer", "float"))
    old = load_everywhere(cli, floats, tmp_path / "floats")
    assert not any(layer.spec.weight.is_multiplied for layer in layers_of(old).values())
    sizes = [(tmp_path / folder / WEIGHTS).stat().st_size for folder in ("release", "floats")]
    assert sizes[0] < sizes[1]


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_layers_of_8_bits_among_integer_scales_have_scales_per_channel(cli: Cli, tmp_path: Path) -> None:
    eight = FEW.replace('{match: "time_embedding.*"}', '{match: "time_embedding.*", weights: {bits: 8}}')
    view = run(cli, "fast-w4a8", eight)
    model = load_everywhere(cli, view, tmp_path / "release")
    found = {name: layer.spec.weight for name, layer in layers_of(model).items()}
    assert found["time_embedding.linear_1"] == WeightSpec(8)
    assert found["mid_block.resnets.0.conv1"].is_multiplied


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_products_of_attention_have_a_mode_of_their_own(cli: Cli, tmp_path: Path) -> None:
    def operands(view: dict[str, Any]) -> tuple[nn.Module, dict[str, tuple[str, int]]]:
        model = load_everywhere(cli, view, tmp_path / view["release"])
        (found,) = (module for module in model.modules() if isinstance(module, AttentionQuantizer))
        return model, {name: (each.spec.mode, each.spec.bits) for name, each in found.named_children()}

    _, other = operands(run(cli, "fast-w4a8", FEW, "attention={mode: dynamic_sample, softmax_bits: 6}"))
    assert other == dict.fromkeys(("query", "key", "value"), ("dynamic_sample", 8)) | {
        "probabilities": ("dynamic_sample", 6)
    }
    view = run(cli, "fast-w4a8", FEW)
    model, shipped = operands(view)
    assert shipped == dict.fromkeys(("query", "key", "value"), ("dynamic_token", 8))  # probabilities are as they are
    assert {layer.spec.activation.mode for layer in layers_of(model).values() if layer.spec.activation} == {"per_step"}
    assert not [name for name in load_file(tmp_path / view["release"] / WEIGHTS) if "attention_quantizer" in name]


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray", "with_digits")
def test_branches_lie_beside_temporal_tables_scaling_shifts_and_correction(cli: Cli, tmp_path: Path) -> None:
    view = run(
        cli,
        "svdquant-w4a8",
        FEW,
        "activations.mode=per_step",
        "passes.low_rank={rank: 2, convolutions: true, smoothing: null, samples: 2, positions: 4}",
        "passes.scale={iterations: 5, samples: 2, positions: 4, shift: variance, least_spread: 0.01}",
        "passes.temporal={method: closed_form, cache: true, cache_ratio: 1000}",
        "passes.correct={seeds: 4, held_out_seeds: 2, shard_seeds: 6, batch_size: 2}",
    )
    model = load_everywhere(cli, view, tmp_path / "release")
    layers = layers_of(model)
    assert any(isinstance(module, FeatureTable) for module in model.modules())
    both = {name for name, layer in layers.items() if layer.spec.low_rank and layer.spec.channel_scale}
    assert both
    assert any(layers[name].spec.channel_shift for name in both)
    scheduler = json.loads((tmp_path / "release" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "QuantmillCorrectedScheduler"


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_fp8_reaches_release_listing_and_export(cli: Cli, tmp_path: Path) -> None:
    view = run(cli, "fp8-w8a8")
    model = load_everywhere(cli, view, tmp_path / "release")
    check_export(cli, view, model, tmp_path / "float")
    assert not format_of(tmp_path / "release").attentions
    tensors = load_file(tmp_path / "release" / WEIGHTS)
    for name, layer in layers_of(model).items():
        assert (layer.spec.weight.type, layer.spec.activation.type) == ("e4m3", "e4m3")
        assert tensors[f"{name}.qweight"].dtype == torch.float8_e4m3fn
        assert tensors[f"{name}.qweight"].float().abs().amax() <= 448
        assert f"{name}.zero_point" not in tensors
    assert (view["metrics"]["weight_bits_mean"], view["metrics"]["act_bits_mean"]) == (8.0, 8.0)
    shown = cli("artifacts", "show", view["release"], "--layers").out
    assert "e4m3" in shown
    assert "oneDNN multiplies integers" in cli("artifacts", "show", view["release"], "--layers", "--backend", "cpu").out
    static = run(cli, "fp8-w8a8", FEW, "activations.mode=per_step", "passes.temporal={method: closed_form}")
    assert cli("artifacts", "pull", static["release"], tmp_path / "static").code == 0
    tables = load_file(tmp_path / "static" / WEIGHTS)
    assert tables["time_embedding.linear_1.act_quantizers.0.scale"].shape == (2,)
    assert tables["mid_block.resnets.0.conv1.qweight"].dtype == torch.float8_e4m3fn
    assert float(view["metrics"]["psnr_db"]) > 15


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_weights_alone_need_no_known_timestep(cli: Cli, tmp_path: Path) -> None:
    view = run(cli, "weights-w4", FEW)
    model = load_everywhere(cli, view, tmp_path / "release")
    assert all(layer.spec.activation is None for layer in layers_of(model).values())
    assert format_of(tmp_path / "release").timesteps == ()
    with torch.no_grad():
        model(torch.randn(1, 1, 16, 16), torch.tensor(123), class_labels=torch.tensor([1]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["svdquant-w4a4", "weights-w8"])
@pytest.mark.usefixtures("without_ray", "with_digits")
def test_the_other_recipes_run(cli: Cli, recipe: str, tmp_path: Path) -> None:
    view = run(cli, recipe)
    load_everywhere(cli, view, tmp_path / "release")


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("svdquant-w4a8", "passes.scale={}", "passes.low_rank.smoothing: got search with passes.scale"),
        ("svdquant-w4a8", "activations.bits=null", "passes.low_rank.smoothing: got search with activations.bits null"),
        ("svdquant-w4a8", "weights={bits: 4, granularity: per_channel, group_size: null}", ""),
        ("fp8-w8a8", "weights.bits=4", "type: got e4m3 with 4 bits per_channel, wanted 8 bits"),
        ("fp8-w8a8", "activations.bits=4", "type: got e4m3 with bits 4, wanted 8"),
        ("fp8-w8a8", "passes.reconstruct={}", "weights.type: got e4m3 with passes.reconstruct, wanted int"),
        (
            "fp8-w8a8",
            "attention={enabled: true, bits: 6}",
            "attention.bits: got 6, softmax_bits 16 with activations.type e4m3",
        ),
        ("fp8-w8a8", "passes.scale={shift: variance}", "passes.scale.shift: got variance with"),
        ("minmax-w8a8", "passes.low_rank={}", "passes.low_rank: got no Linear layer"),
    ],
)
@pytest.mark.usefixtures("with_digits")
def test_what_does_not_fit_together_is_refused(cli: Cli, recipe: str, change: str, message: str) -> None:
    words = ("--set", "passes.allocate={}") if not message else ()
    answer = cli("submit", recipe, "--model", "digits", "--set", change, *words, "--dry-run")
    assert answer.code == 2
    assert (message or "passes.low_rank: got it with passes.allocate") in answer.err
