"""A recipe with a menu, from the command line: the release is the one that the same bits give without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.orchestrator.conftest import Cli

RECIPE = """
extends: base
sampler: {num_inference_steps: 2}
calibration: {seeds: 2, shard_seeds: 2, batch_size: 4}
weights: {bits: 4}
layers:
  - {match: "conv_in", weights: {bits: 3}}
  - {match: "mid_block.resnets.0.conv1", weights: {bits: 2}, activations: {bits: 6}}
  - {match: "conv_out", keep: true}
passes: {round: {method: closed_form, positions: 2}%s}
evaluation: {seeds: 2, shard_seeds: 2, batch_size: 2, sqnr_seeds: 2, grid: 2}
"""


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_a_recipe_with_a_menu_gives_the_weights_of_its_bits(cli: Cli, tmp_path: Path) -> None:
    digests = {}
    for name, menu in (("with", ", menu: {weight_bits: [2, 3], activation_bits: [6]}"), ("without", "")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(RECIPE % menu)
        out = tmp_path / f"out-{name}"
        answer = cli("run", file, "--model", "digits", "--out", out, "--json")
        assert answer.code == 0, answer.err
        weights = next(out.rglob("*.safetensors")).read_bytes()
        digests[name] = hashlib.sha256(weights).hexdigest()
        kinds = cli("submit", file, "--model", "digits", "--dry-run", "--json").json["kinds"]
        assert ("mix" in kinds) == (name == "with")
        assert ("round" in kinds) == (name == "without")
    assert digests["with"] == digests["without"]


@pytest.mark.usefixtures("with_digits")
def test_bits_that_are_not_on_the_menu_are_refused(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(RECIPE % ", menu: {weight_bits: [2, 5], activation_bits: [6]}")
    answer = cli("run", file, "--model", "digits")
    assert answer.code == 2
    assert answer.err.strip().endswith("layer conv_in: weights.bits: got 3 bits, wanted one of the menu's 2, 4, 5")
