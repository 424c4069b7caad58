"""Distillation from the command line: steps that count by their effect, and codes that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quant_core
from orchestrator.cli.main import run_cli
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.nn.feature_table import FeatureTable
from tests.orchestrator.conftest import Cli
from tests.tiny_pipelines import save_sd3

DIGITS = Path(__file__).parents[3] / "examples/models/digits"

RECIPE = """
extends: base
sampler: {num_inference_steps: 3}
calibration: {seeds: 2, shard_seeds: 2, batch_size: 4}
weights: {bits: 3}
activations: {bits: 4}
passes: {distill: {iterations: 3, batch_size: 2, seeds: 2, shard_seeds: 2, relations: false, rank: 2}}
evaluation: {seeds: 2, shard_seeds: 2, batch_size: 2, sqnr_seeds: 2, grid: 2}
"""


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_steps_count_by_their_measured_effect_if_a_recipe_asks_for_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text(RECIPE)
    jobs = []
    for options in ((), ("--set", "passes.distill.effect=0.5")):
        answer = cli("run", tmp_path / "ours.yaml", "--model", "digits", "--json", *options)
        assert answer.code == 0, answer.err
        jobs.append(answer.json)
    logs = [cli("jobs", "logs", job["job"]).out for job in jobs]
    assert ["step_gains" in log for log in logs] == [False, True]
    assert jobs[0]["metrics"]["psnr_db"] != jobs[1]["metrics"]["psnr_db"]


FROZEN = "passes.distill={codes: frozen, iterations: 3, batch_size: 2, seeds: 2, shard_seeds: 2, relations: false}"
#: What decides which numbers weights are, but for scales.
CODES = (".qweight", ".zero_point", ".multiplier")
GROUPS = "weights={bits: 4, granularity: per_group, group_size: 16, group_scale: integer}"


def packed(cli: Cli, folder: Path, name: str, *settings: str) -> dict[str, Tensor]:
    """Quantize the digits model and return what is packed."""
    (folder / "ours.yaml").write_text(RECIPE)
    sets = [word for setting in settings for word in ("--set", setting)]
    answer = cli("run", folder / "ours.yaml", "--model", "digits", "--out", folder / name, "--name", name, *sets)
    assert answer.code == 0, answer.err
    return load_file(next((folder / name).rglob("*.safetensors")))


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_codes_stay_and_a_release_has_the_scales_biases_and_norms_that_were_learned(cli: Cli, tmp_path: Path) -> None:
    plain = packed(cli, tmp_path, "plain", GROUPS, "passes.distill=null")
    tuned = packed(cli, tmp_path, "tuned", GROUPS, FROZEN)
    assert plain.keys() == tuned.keys()
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, tuned[name])}
    codes = {name for name in plain if name.endswith(CODES) and "quantizer" not in name}
    assert len(codes) > 80
    assert not changed & codes
    layers = {name.removesuffix(".qweight") for name in codes if name.endswith(".qweight")}
    norms = {name for name in load_denoiser(DIGITS).model.state_dict() if ".norm" in name or "conv_norm_out" in name}
    norms -= {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    tables = {name for name in plain if "act_quantizers" in name and name.endswith(".scale")}
    assert len(norms) > 40
    assert norms | tables | {f"{layer}.scale" for layer in layers} <= changed
    assert {f"{layer}.bias" for layer in layers} & plain.keys() <= changed


@pytest.mark.usefixtures("without_ray", "with_digits")
def test_what_stands_around_codes_is_learned_upon_tables_shifts_and_bits_by_step(cli: Cli, tmp_path: Path) -> None:
    upon = (
        *("passes.temporal={cache: true}", "passes.scale={method: smooth, shift: skip}", "weights.bits=4"),
        *("passes.exceptions={choices: [3, 4, 6], seeds: 1}", "activations.range=mse"),
        # Fewer parts to try.
        "layers=[{match: 'down_blocks.*', keep: true}, {match: 'mid_block.*', keep: true}]",
    )
    plain = packed(cli, tmp_path, "plain", *upon, "passes.distill=null")
    tuned = packed(cli, tmp_path, "tuned", *upon, FROZEN)
    model = quant_core.load_quantized(tmp_path / "tuned", device="cpu", backend="reference")
    features = [name for name, module in model.named_modules() if isinstance(module, FeatureTable)]
    assert features
    shifts = [name for name in plain if name.endswith(("channel_scale", "channel_shift"))]
    assert any(name.endswith("channel_shift") for name in shifts)
    stay = [*(f"{name}.values" for name in features), *shifts, *(name for name in plain if name.endswith(".qweight"))]
    assert all(torch.equal(plain[name], tuned[name]) for name in stay)
    learned = [name for name in plain if "act_quantizers" in name and name.endswith(".scale")]
    assert all(not torch.equal(plain[name], tuned[name]) for name in learned)
    # Bits of inputs are chosen before: both releases have the same.
    config = [(tmp_path / name / "config.json").read_text() for name in ("plain", "tuned")]
    assert "step_bits" in config[0]
    assert config[0] == config[1]


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("recipe", "settings"), [("svdquant-w4a8", ["passes.low_rank={rank: 2}"]), ("fp8-w8a8", []), ("weights-w4", [])]
)
def test_codes_of_transformers_stay(home: Path, tmp_path: Path, recipe: str, settings: list[str]) -> None:
    save_sd3(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
    small = (
        *("sampler.num_inference_steps=2", "sampler.guidance_scale=4", "calibration.seeds=2", "evaluation.seeds=2"),
        *("evaluation.sqnr_seeds=1", "evaluation.grid=2", *settings),
    )
    found = []
    for name, distilled in (("plain", "passes.distill=null"), ("tuned", FROZEN)):
        words = [word for setting in (*small, distilled) for word in ("--set", setting)]
        words += ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / name), "--name", name]
        assert run_cli(["--home", str(home), "run", recipe, "--model", str(tmp_path / "sd3"), *words]) == 0
        found.append(load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors"))
    plain, tuned = found
    codes = [name for name in plain if name.endswith((*CODES, ".low_rank_down", ".low_rank_up"))]
    assert all(torch.equal(plain[name], tuned[name]) for name in codes)
    scales = [name for name in plain if name.endswith(".scale") and f"{name.removesuffix('scale')}qweight" in plain]
    assert sum(not torch.equal(plain[name], tuned[name]) for name in scales) > 0.5 * len(scales)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        (
            "modiff-w4a4",
            ["passes.distill={codes: frozen}"],
            "passes.distill.codes: got frozen beside passes.differences, wanted one of them: it learns for inputs that "
            "are quantized as they are",
        ),
        (
            "fast-w4a8",
            ["passes.distill={codes: frozen, rank: 4}"],
            "passes.distill.rank: got 4, which matters only with codes learned, wanted it left out",
        ),
        (
            "fast-w4a8",
            ["passes.distill={norm_lr: 0.1}"],
            "passes.distill.norm_lr: got 0.1, which matters only with codes frozen, wanted it left out",
        ),
        ("fp8-w8a8", ["passes.distill={}"], "got e4m3 with passes.distill, wanted int"),
    ],
)
def test_what_frozen_codes_leave_no_room_for_is_refused(
    cli: Cli, digits: Path, recipe: str, settings: list[str], message: str
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    answer = cli("submit", recipe, "--model", digits, *words, "--dry-run")
    assert answer.code == 2
    assert message in answer.err
