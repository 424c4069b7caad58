"""The formats of transformers, from the command line to a loaded model: low-rank branches, FP8, weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quant_core
from quant_core.nn.layers import QuantLayer

Cli = Callable[..., Any]

SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "4",
    "calibration.batch_size": "4",
    "evaluation.seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}


def run(cli: Cli, recipe: str, *more: str) -> dict[str, Any]:
    """Quantize the small model; return its release's view."""
    words = [word for each in (*(f"{key}={value}" for key, value in SMALL.items()), *more) for word in ("--set", each)]
    view: dict[str, Any] = cli("run", recipe, "--model", "digits", *words, "--json").json
    assert (view["state"], view["error"]) == ("succeeded", None), view["error"]
    return view


def predict(model: nn.Module) -> torch.Tensor:
    """Call the small model at the first of two steps."""
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(x, torch.tensor(500), class_labels=torch.tensor([1, 7])).sample


def check_everywhere(cli: Cli, view: dict[str, Any], folder: Path) -> nn.Module:
    """Load a release each way, save it again, export it; all are one model. Return that of plain diffusers."""
    assert cli("artifacts", "pull", view["release"], folder).code == 0
    plain = diffusers.UNet2DModel.from_pretrained(folder)
    want = predict(plain)
    assert torch.equal(predict(quant_core.load_quantized(folder, backend="reference")), want)
    for backend in ("auto", "cpu"):
        got = predict(quant_core.load_quantized(folder, backend=backend))
        assert float((got - want).norm() / want.norm()) < 2e-2, backend
    plain.save_pretrained(folder / "again")
    assert torch.equal(predict(diffusers.UNet2DModel.from_pretrained(folder / "again")), want)
    weights = "diffusion_pytorch_model.safetensors"
    assert (folder / "again" / weights).read_bytes() == (folder / weights).read_bytes()
    assert cli("artifacts", "export", view["release"], folder / "float").code == 0
    exported = diffusers.UNet2DModel.from_pretrained(folder / "float", torch_dtype=torch.float32)
    for name, layer in plain.named_modules():
        if isinstance(layer, QuantLayer):
            wanted = layer.unscaled(layer.weight)
            torch.testing.assert_close(exported.get_parameter(f"{name}.weight"), wanted, rtol=1e-3, atol=1e-4)
    return plain


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_low_rank_branches_reach_release_and_listing(cli: Cli, tmp_path: Path) -> None:
    view = run(cli, "svdquant-w4a8", "passes.low_rank.rank=4", "passes.low_rank.convolutions=true")
    model = check_everywhere(cli, view, tmp_path / "release")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    branched = {name for name, layer in layers.items() if layer.spec.low_rank}
    assert {name for name in layers if layers[name].spec.weight.bits == 4} == branched
    shown = cli("artifacts", "show", view["release"], "--layers").out
    assert " 4 + rank 4 " in shown
    tensors = load_file(tmp_path / "release" / "diffusion_pytorch_model.safetensors")
    name = next(iter(branched))
    assert tensors[f"{name}.low_rank_up"].dtype == torch.bfloat16
    # a branch costs bits
    rows, columns = layers[name].shape[0], layers[name].columns
    assert view["metrics"]["weight_bits_mean"] > 4 + 16 * 4 * (rows + columns) / (rows * columns) / 100
