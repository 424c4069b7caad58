"""Biases that take the mean error of rounded weights, from the command line, where a recipe asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quant_core.diffusion.denoiser import load_denoiser
from tests.orchestrator.conftest import Cli

DIGITS = Path(__file__).parents[3] / "examples/models/digits"
RECIPE = """
extends: base
sampler: {num_inference_steps: 2}
calibration: {seeds: 2, shard_seeds: 2, batch_size: 4}
weights: {bits: 4}
layers: [{match: "conv_out", keep: true}]
passes: {round: {method: closed_form, positions: 2}}
evaluation: {seeds: 2, shard_seeds: 2, batch_size: 2, sqnr_seeds: 2, grid: 2}
"""


def packed(cli: Cli, folder: Path, *options: str) -> dict[str, Tensor]:
    """Quantize the digits model and return what is packed."""
    (folder / "ours.yaml").write_text(RECIPE)
    out = folder / "-".join(("out", *options)).replace("=", "-")
    answer = cli("run", folder / "ours.yaml", "--model", "digits", "--out", out, "--json", *options)
    assert answer.code == 0, answer.err
    return load_file(next(out.rglob("*.safetensors")))


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_rounded_layers_have_biases_of_their_own_if_they_are_to_take_the_error(cli: Cli, tmp_path: Path) -> None:
    exact = load_denoiser(DIGITS).model.state_dict()
    moved = packed(cli, tmp_path, "--set", "passes.round.correct_bias=true")
    kept = packed(cli, tmp_path)
    layers = {name.removesuffix(".qweight") for name in kept if name.endswith(".qweight")}
    biases = [f"{layer}.bias" for layer in layers if f"{layer}.bias" in exact]
    assert len(biases) > 20
    assert all(torch.equal(kept[name].float(), exact[name]) for name in biases)
    assert sum(not torch.equal(moved[name].float(), exact[name]) for name in biases) > 0.9 * len(biases)
    assert torch.equal(moved["conv_out.bias"].float(), exact["conv_out.bias"])
