"""Exceptions found by trying each part of the model, from the command line to a pipeline that a user calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from orchestrator.cli.main import run_cli
from quant_core import load_quantized
from quant_core.metrics.psnr import psnr_per_sample
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import ActivationMode, KernelBackend, SampleSpace
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import EMOJI_SD, save_dit

Cli = Callable[..., Any]
DIGITS = Path(__file__).parents[3] / "examples" / "models" / "digits"
STEPS = 3
SMALL = {
    "sampler.num_inference_steps": STEPS,
    "sampler.guidance_scale": 4,
    "calibration.seeds": 2,
    "evaluation.seeds": 2,
    "evaluation.sqnr_seeds": 1,
    "evaluation.grid": 2,
    "passes.scale": "{method: smooth}",
    # Few parts to try: one transformer.
    "layers": "[{match: '*', keep: true}, {match: 'up_blocks.2.attentions.1.*', keep: false}]",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
PROMPTS = "red heart\nred apple\nowl\nblue car\n"
BUDGET = "{multiplications: 0.02, bytes: 0.2, seeds: 1}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which a guided pipeline was quantized with and without exceptions, and the releases."""
    folder = tmp_path_factory.mktemp("exceptions")
    (folder / "prompts.txt").write_text(PROMPTS)
    shutil.copytree(EMOJI_SD, folder / "sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        home = ["--home", str(folder / "home")]
        words = ["run", "minmax-w8a8", "--model", str(folder / "sd"), "--prompts", str(folder / "prompts.txt"), *SET]
        assert run_cli([*home, *words, "--name", "plain"]) == 0
        assert run_cli([*home, *words, "--name", "excepted", "--set", f"passes.exceptions={BUDGET}"]) == 0
        assert run_cli([*home, "artifacts", "pull", "excepted", str(folder / "release")]) == 0
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the jobs ran; the folder with the releases."""
    shutil.copytree(made / "home", home)
    return made


def metrics_of(cli: Cli, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cli("artifacts", "show", name, "--json").json["metrics"]
    return found


def test_what_costs_most_stays_in_full_precision_within_the_budget(cli: Cli, used: Path) -> None:
    plain, excepted = metrics_of(cli, "plain"), metrics_of(cli, "excepted")
    assert excepted["psnr_db"] > plain["psnr_db"] + 1
    # Inputs have 24 bits more where they are exact; the share is of all multiplications, attention's among them.
    assert 0 < excepted["act_bits_mean"] - plain["act_bits_mean"] < 0.02 * 24 * 1.1
    assert plain["bytes"] < excepted["bytes"] < 1.06 * plain["bytes"]
    assert excepted["bops"] > plain["bops"]


def test_the_release_says_what_is_excepted_and_draws_what_was_measured(cli: Cli, used: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(used / "release", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    layers = {name: each for name, each in pipeline.unet.named_modules() if isinstance(each, QuantLayer)}
    exact = [name for name, layer in layers.items() if layer.spec.activation is None]
    assert exact
    assert any(layers[name].spec.channel_scale for name in exact)  # rounded for an input that is divided
    original: Any = DiffusionPipeline.from_pretrained(used / "sd", dtype=torch.float32)
    original.set_progress_bar_config(disable=True)
    drawn = [
        torch.from_numpy(
            each(
                ["red apple", "blue car"],
                num_inference_steps=STEPS,
                guidance_scale=4.0,
                generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
                output_type="np",
            ).images
        ).permute(0, 3, 1, 2)
        * 2
        - 1
        for each in (original, pipeline)
    ]
    measured = psnr_per_sample(drawn[0], drawn[1], SampleSpace.PIXELS).mean()
    assert float(measured) == pytest.approx(metrics_of(cli, "excepted")["psnr_db"], abs=1e-3)


def test_the_recipe_shows_the_pass_and_refuses_a_budget_that_is_none(cli: Cli) -> None:
    shown = cli("recipes", "show", "dmq-w8a8", "--set", "passes.exceptions={}").out
    assert "multiplications: 0.1" in shown
    refused = cli("recipes", "show", "dmq-w8a8", "--set", "passes.exceptions.multiplications=2")
    assert refused.code == 2
    assert "multiplications" in refused.err


@pytest.mark.usefixtures("without_ray")
def test_inputs_have_bits_by_layer_and_step_at_the_same_mean(cli: Cli, tmp_path: Path) -> None:
    sizes = {name: value for name, value in SMALL.items() if "guidance" not in name}
    sizes |= {"activations.bits": 4, "activations.range": "mse"}
    sizes["layers"] = "[{match: '*', keep: true}, {match: 'up_blocks.2.*', keep: false}]"
    words = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    told = ["run", "minmax-w8a8", "--model", DIGITS, *words, "--json"]
    one = cli(*told, "--name", "one").json["metrics"]
    chosen = ["--set", "passes.exceptions={choices: [3, 4, 6], seeds: 1}"]
    done = cli(*told, *chosen, "--out", tmp_path / "release").json
    assert done["metrics"]["act_bits_mean"] <= one["act_bits_mean"]
    assert done["metrics"]["bytes"] == one["bytes"]
    assert done["metrics"]["psnr_db"] > one["psnr_db"] + 1
    model = load_quantized(tmp_path / "release", backend=KernelBackend.REFERENCE)
    specs = [each.spec.activation for each in model.modules() if isinstance(each, QuantLayer)]
    widths = [spec.step_bits or (spec.bits,) * STEPS for spec in specs if spec is not None]
    assert {bits for own in widths for bits in own} == {3, 4, 6}
    assert any(len(set(own)) > 1 for own in widths)
    assert all(own[-1] >= 4 for own in widths)
    assert {"step_gains", "trials"} <= {task["kind"] for task in done["ran"]}


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(("recipe", "bits"), [("dynamic-w8a8", 8), ("dynamic-w4a8", 4)])
def test_recipes_for_transformers_take_ranges_of_each_token_and_except_what_costs_most(
    recipe: str, bits: int, cli: Cli, tmp_path: Path
) -> None:
    save_dit(tmp_path / "dit")
    sizes = {name: value for name, value in SMALL.items() if name not in ("passes.scale", "layers")}
    words = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    done = cli("run", recipe, "--model", tmp_path / "dit", *words, "--out", tmp_path / "release", "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["n"] == 2
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "release", dtype=torch.float32)
    layers = [each for each in pipeline.transformer.modules() if isinstance(each, QuantLayer)]
    inputs = [layer.spec.activation for layer in layers]
    assert {spec.mode for spec in inputs if spec is not None} == {ActivationMode.DYNAMIC_TOKEN}
    assert None in inputs
    assert bits in {layer.spec.weight.bits for layer in layers}
    shown = cli("artifacts", "show", done.json["release"], "--layers", "--backend", "triton", "--json").json["layers"]
    reasons = {each["layer"]: each["reason"] for each in shown}
    said = "LayerNorm and modulation with the quantization"
    fused = [name for name, reason in reasons.items() if said in reason]
    assert fused
    assert {name.rpartition(".")[2] for name in fused} <= {"to_q", "to_k", "to_v", "proj"}
