"""Whole jobs through the command line, on everything that a laptop and a cluster have: the same bytes everywhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from orchestrator.cli.main import run_cli
from quant_core import load_quantized
from tests.orchestrator.in_process import InProcess

ROOT = Path(__file__).parents[1]
RECIPE = "qdiffusion-w4a8"
SETTINGS = {
    "sampler.num_inference_steps": 4,
    "calibration.seeds": 4,
    "calibration.shard_seeds": 2,
    "passes.reconstruct.iterations": 8,
    "evaluation.seeds": 8,
    "evaluation.shard_seeds": 4,
    "evaluation.sqnr_seeds": 4,
    "evaluation.grid": 4,
}
pytestmark = pytest.mark.ray


def to_options(settings: Mapping[str, int]) -> list[str]:
    """Return settings as options of the command line."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


SET = to_options(SETTINGS)


def quantmill(*words: str | Path, variables: Mapping[str, str] = {}) -> Any:
    """Call the command line in a process of its own, as a user does; return its JSON."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTMILL", "RAY"))}
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=known | variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional UNet of random weights, with skips and attention: each task takes a moment."""
    folder = tmp_path_factory.mktemp("model") / "little"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=10,
    )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an embedded database and store."""
    return tmp_path_factory.mktemp("embedded") / "home"


def answer_here(*words: str | Path) -> Any:
    """Call the command line in this process; return its JSON."""
    answer = io.StringIO()
    with redirect_stdout(answer):
        assert run_cli([*map(str, words), "--json"]) == 0
    return json.loads(answer.getvalue())


def run_here(home: Path, model: Path, *words: str) -> dict[str, Any]:
    """Run a job in this process, one task after another: what it gives has nothing to do with Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        found: dict[str, Any] = answer_here("--home", home, "run", RECIPE, "--model", model, *SET, *words)
    return found


@pytest.fixture(scope="module")
def job(home: Path, model: Path) -> dict[str, Any]:
    """The job that ran there."""
    return run_here(home, model)


def test_embedded_and_grown_up_give_the_same_artifact(
    job: dict[str, Any], model: Path, empty_postgres_url: str, s3_url: str, tmp_path: Path
) -> None:
    variables = {
        "QUANTMILL_HOME": str(tmp_path / "home"),
        "QUANTMILL_DB": empty_postgres_url,
        "QUANTMILL_STORE": s3_url,
    }
    quantmill("init", variables=variables)
    there = quantmill("run", RECIPE, "--model", model, *SET, variables=variables)
    assert there["tasks"]["cached"] == 0
    assert (there["release"], there["digest"], there["metrics"]) == (job["release"], job["digest"], job["metrics"])
    quantmill("artifacts", "pull", there["release"], tmp_path / "pulled", variables=variables)
    assert load_quantized(tmp_path / "pulled", backend="reference").config["sample_size"] == 16
    assert not list((tmp_path / "home").glob("*.db"))


def test_a_release_loads_by_name_and_by_folder_alike(
    job: dict[str, Any], home: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_here("--home", home, "artifacts", "alias", job["release"], "prod")
    answer_here("--home", home, "artifacts", "pull", job["release"], tmp_path / "pulled")
    monkeypatch.setenv("QUANTMILL_HOME", str(home))
    by_name = load_quantized(job["release"].partition("@")[0] + "@prod", backend="reference")
    plain = UNet2DModel.from_pretrained(tmp_path / "pulled").eval()
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "pulled", subfolder="scheduler")
    scheduler.set_timesteps(SETTINGS["sampler.num_inference_steps"])
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(2, 1, 16, 16, generator=generator)
    labels = torch.tensor([3, 8])
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            one = by_name(sample, timestep, class_labels=labels).sample
            two = plain(sample, timestep, class_labels=labels).sample
        assert torch.equal(one, two)
        sample = scheduler.step(one, timestep, sample).prev_sample
    original = UNet2DModel.from_pretrained(model / "unet")
    size = (tmp_path / "pulled" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.5 * 2 * sum(parameter.numel() for parameter in original.parameters())


def test_jobs_share_what_their_recipes_have_in_common(job: dict[str, Any], home: Path, model: Path) -> None:
    words = ["--home", home, "submit", "minmax-w8a8", "--model", model]
    settings = to_options({name: value for name, value in SETTINGS.items() if "reconstruct" not in name})
    shared = answer_here(*words, *settings, "--dry-run")
    shards = 2 + 2  # calibration, reference samples
    assert shared["tasks"]["cached"] == shards
    other = answer_here(*words, *settings, "--set", "calibration.first_seed=5000", "--dry-run")
    assert other["tasks"]["cached"] == 2


@pytest.mark.slow
def test_inputs_from_the_quantized_model_give_another_artifact(job: dict[str, Any], home: Path, model: Path) -> None:
    found = run_here(home, model, "--set", "passes.reconstruct.inputs=quantized")
    assert found["digest"] != job["digest"]
    assert found["release"].endswith("@2")
    # Everything but the reconstruction and what follows from it is known already.
    assert found["tasks"]["cached"] >= 4
    assert found["metrics"]["psnr_db"] > 20
    assert found["metrics"]["bytes"] == pytest.approx(job["metrics"]["bytes"], rel=0.01)
