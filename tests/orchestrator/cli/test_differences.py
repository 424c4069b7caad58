"""Activations in differences between steps, from the command line to a pipeline that a user calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import quant_core
from kernels.cpu_weight import sums_pairs_exactly
from orchestrator.cli.main import run_cli
from quant_core.errors import TrajectoryError
from quant_core.metrics.psnr import psnr_per_sample
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import SampleSpace
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import save_sd

Cli = Callable[..., Any]
STEPS = 4
SMALL = {
    "sampler.num_inference_steps": STEPS,
    "calibration.seeds": 2,
    "evaluation.seeds": 2,
    "evaluation.sqnr_seeds": 1,
    "evaluation.grid": 2,
    "weights.range": "minmax",
    "passes.round.method": "nearest",
    "passes.differences.samples": 4,
    "passes.differences.least_gain_db": 0,
    "passes.differences.by_effect": "true",
    # Has tests of its own (test_choose.py).
    "passes.choose": "null",
    "passes.menu": "null",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
#: What takes long on a pipeline's denoiser, and has tests of its own.
ALONE = ["--set", "passes.scale=null", "--set", "passes.temporal=null"]
PROMPTS = "red heart\nred apple\nowl\nblue car\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which a guided pipeline was quantized, and its release."""
    folder = tmp_path_factory.mktemp("differences")
    (folder / "prompts.txt").write_text(PROMPTS)
    save_sd(folder / "sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        home = ["--home", str(folder / "home")]
        words = ["run", "modiff-w4a4", "--model", str(folder / "sd"), "--prompts", str(folder / "prompts.txt")]
        assert run_cli([*home, *words, *SET, *ALONE, "--set", "sampler.guidance_scale=4"]) == 0
        assert run_cli([*home, "artifacts", "pull", "sd-modiff-w4a4", str(folder / "release")]) == 0
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the job ran; the folder of the release."""
    shutil.copytree(made / "home", home)
    return made


def load(folder: Path) -> Any:
    """Load a pipeline as a user does."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(made: Path) -> Any:
    """The release, as a user loads it."""
    return load(made / "release")


def draw(pipeline: Any, *seeds: int, steps: int = STEPS, **more: Any) -> Tensor:
    """Draw as the evaluation of these seeds did: its prompts are every second line. Pixels in [-1, 1]."""
    images = pipeline(
        [("red apple", "blue car")[seed % 2] for seed in seeds],
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **more,
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def test_a_release_draws_what_its_evaluation_measured_every_time(cli: Cli, used: Path, pipeline: Any) -> None:
    metrics = cli("artifacts", "show", "sd-modiff-w4a4", "--json").json["metrics"]
    exact, drawn = draw(load(used / "sd"), 0, 1), draw(pipeline, 0, 1)
    measured = psnr_per_sample(exact, drawn, SampleSpace.PIXELS).mean()
    assert float(measured) == pytest.approx(metrics["psnr_db"], abs=1e-3)
    assert torch.equal(draw(pipeline, 0, 1), drawn)
    assert draw(pipeline, 0).shape[0] == 1  # another batch size, from one call to the next
    assert torch.equal(draw(pipeline, 0, 1), drawn)
    layers = [module for module in pipeline.unet.modules() if isinstance(module, QuantLayer)]
    assert any(layer.differences for layer in layers)
    assert all(layer.memory.nbytes == 0 for layer in layers)  # nothing is kept between calls


def test_show_says_what_is_remembered_and_bits_count_differences(cli: Cli, used: Path) -> None:
    metrics = cli("artifacts", "show", "sd-modiff-w4a4", "--json").json["metrics"]
    held = metrics["difference_state_bytes"]
    assert 1e5 < held < 256 * 2**20
    assert 4 < metrics["act_bits_mean"] < 8
    assert "per row, between steps" in cli("artifacts", "show", "sd-modiff-w4a4").out
    card = (used / "release" / "README.md").read_text()
    assert f"| remembered between steps, bytes per row | {held} |" in card


def test_steps_of_layers_have_bits_by_their_effect(cli: Cli, used: Path, pipeline: Any) -> None:
    layers = [module for module in pipeline.unet.modules() if isinstance(module, QuantLayer)]
    specs = [layer.spec.activation for layer in layers if layer.differences]
    assert len({bits for spec in specs if spec is not None for bits in spec.step_bits[1:]}) > 2
    assert "step_gains" in cli("jobs", "logs", cli("jobs", "ls", "--json").json[0]["job"]).out


def test_an_interrupted_trajectory_leaves_nothing_behind(pipeline: Any) -> None:
    drawn = draw(pipeline, 1)

    def stop(pipe: Any, step: int, timestep: Any, told: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return told

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, 0, callback_on_step_end=stop)
    assert torch.equal(draw(pipeline, 1), drawn)


def test_other_steps_are_refused_and_the_next_call_is_right(pipeline: Any) -> None:
    drawn = draw(pipeline, 0)
    with pytest.raises(
        TrajectoryError, match=r"wanted step 0 .* hold differences between steps.*num_inference_steps=4"
    ):
        draw(pipeline, 0, steps=2)  # timesteps that the model knows, but not all of them
    assert torch.equal(draw(pipeline, 0), drawn)


def test_halves_of_a_guided_batch_have_states_of_their_own(pipeline: Any) -> None:
    two = draw(pipeline, 0, 1)
    for seed in (0, 1):
        alone = draw(pipeline, seed)
        assert float((alone[0] - two[seed]).abs().mean()) < 0.05 < float((two[0] - two[1]).abs().mean())


@pytest.mark.skipif(not sums_pairs_exactly(), reason="this CPU's int8 products would saturate")
def test_integer_arithmetic_draws_as_well(made: Path, pipeline: Any) -> None:
    fast = load(made / "release")
    fast.unet = quant_core.load_quantized(made / "release", backend="cpu")
    runs = quant_core.layer_runs(fast.unet)
    assert sum("of differences" in run.reason for run in runs) > 20
    exact, one, two = draw(load(made / "sd"), 0), draw(pipeline, 0), draw(fast, 0)
    # Codes that fall to the other side stay in what later steps start from, so both go their own ways, equally far.
    assert float((two - exact).square().mean()) < 1.3 * float((one - exact).square().mean())
    assert torch.equal(draw(fast, 0), two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["activations.mode=static"], "passes.differences: got activations of bits 8, mode static"),
        (["activations.bits=3"], "passes.differences: got 4 bits with activations.bits 3, wanted at most as many"),
        (
            ["activations.step_bits={}", "passes.choose=null", "passes.menu=null"],
            "passes.differences: got it beside activations.step_bits",
        ),
        (["passes.differences.range=percentile"], "got percentile, wanted minmax or mse"),
        (["passes.differences.bitz=4"], "passes.differences.bitz"),
    ],
)
def test_what_can_not_be_is_refused(cli: Cli, digits: Path, settings: list[str], message: str) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    answer = cli("submit", "modiff-w4a4", "--model", digits, *words, "--dry-run")
    assert answer.code == 2
    assert message in answer.err


@pytest.mark.slow
def test_scaling_tables_and_a_correction_compose_with_differences(
    cli: Cli, digits: Path, without_ray: None, tmp_path: Path
) -> None:
    words = [*SET, "--set", "passes.correct.seeds=2", "--set", "passes.correct.held_out_seeds=1"]
    words += ["--set", "passes.scale.iterations=2", "--set", "passes.temporal.iterations=2"]
    found = cli("run", "modiff-w4a6", "--model", digits, *words, "--out", tmp_path / "out", "--json")
    assert found.code == 0, found.err
    assert found.json["metrics"]["psnr_db"] > 15
    assert found.json["metrics"]["difference_state_bytes"] > 0
    model = quant_core.load_quantized(tmp_path / "out", backend="reference")
    assert any(isinstance(module, QuantLayer) and module.differences for module in model.modules())
