"""Models that cannot be quantized as they are: one line that says what is missing, as early as it can be known."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from workers.storage.store import open_store

Cli = Callable[..., Any]
SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "2",
    "evaluation.seeds": "2",
    "evaluation.shard_seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def unet(**changes: Any) -> nn.Module:
    """A small UNet on images of 16 x 16."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**config | changes)


def text_unet(**changes: Any) -> nn.Module:
    """A small UNet on latents of 4 x 8 x 8 that is told prompts of width 16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DConditionModel(**config | changes)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder: a network, its scheduler (DDIM by default), and conditioning if any is given."""

    def write_model(model: nn.Module, scheduler: Any = None, name: str = "model", **conditioning: torch.Tensor) -> Path:
        from diffusers import DDIMScheduler

        folder = tmp_path / name
        model.save_pretrained(folder / "unet")  # type: ignore[operator]
        (scheduler or DDIMScheduler(clip_sample=False)).save_pretrained(folder / "scheduler")
        if conditioning:
            save_file({key.replace("null_", "null."): value for key, value in conditioning.items()}, folder / FILE)
        return folder

    return write_model


FILE = "conditioning.safetensors"


def prompts(width: int = 16, dtype: torch.dtype = torch.float32, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_refused(answer: Any, *words: str) -> None:
    """Check for exit code 2, an empty stdout, and one line on stderr with these words."""
    assert (answer.code, answer.out) == (2, ""), answer
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in last, last


def each_way(cli: Cli, folder: Path, *more: str) -> list[Any]:
    """Submit a job on a folder, look at what it would take, and run it."""
    words = ["fast-w4a8", "--model", folder, *SET, *more]
    return [cli("submit", *words), cli("submit", *words, "--dry-run"), cli("run", *words)]


def test_a_concatenated_input_is_refused_when_the_model_is_added(cli: Cli, write: Callable[..., Path]) -> None:
    folder = write(text_unet(in_channels=9), encoder_hidden_states=prompts())
    for answer in (cli("models", "add", folder), cli("submit", "fast-w4a8", "--model", folder, "--dry-run")):
        assert_refused(answer, "UNet2DConditionModel", "(4, 8, 8)", "(9, 8, 8)", "concatenation")
    assert cli("models", "ls", "--json").json == []


def test_prompts_that_are_not_there_are_missed_before_anything_runs(
    cli: Cli, home: Path, write: Callable[..., Path]
) -> None:
    folder = write(text_unet())
    added = cli("models", "add", folder)
    assert added.code == 0
    assert "encoder_hidden_states" in added.err
    for answer in each_way(cli, folder):
        assert_refused(answer, "model", "got no encoder_hidden_states", FILE, "one row per prompt")
    # what an earlier Quantmill registered is looked at again
    with sqlite3.connect(home / "quantmill.db") as connection:
        (text,) = connection.execute("SELECT inspection FROM models").fetchone()
        old = {
            key: value for key, value in json.loads(text).items() if key not in ("has_tokens", "missing_conditioning")
        }
        connection.execute("UPDATE models SET inspection = ?", (json.dumps(old),))
    connection.close()
    assert_refused(cli("submit", "fast-w4a8", "--model", "model"), "encoder_hidden_states")
    assert cli("jobs", "ls", "--json").json == []


def test_a_noise_level_as_class_embedding(cli: Cli, write: Callable[..., Path]) -> None:
    model = unet(class_embed_type="timestep")
    assert_refused(cli("submit", "fast-w4a8", "--model", write(model)), "got no class_labels", FILE)
    told = write(model, name="told", class_labels=torch.rand(3))
    assert cli("submit", "fast-w4a8", "--model", told, *SET).code == 0


def test_prompts_in_half_precision(cli: Cli, write: Callable[..., Path]) -> None:
    folder = write(text_unet(), encoder_hidden_states=prompts(dtype=torch.float16))
    assert cli("submit", "fast-w4a8", "--model", folder, *SET).code == 0


def test_prompts_of_another_width(cli: Cli, write: Callable[..., Path]) -> None:
    wide = write(text_unet(), encoder_hidden_states=prompts(width=20))
    refused = cli("models", "add", wide)
    assert_refused(
        refused, "UNet2DConditionModel cannot be called with", "encoder_hidden_states (1, 5, 20)", "rows of 16"
    )


def test_guidance_that_has_nothing_to_compare_with(cli: Cli, write: Callable[..., Path]) -> None:
    plain = write(text_unet(), encoder_hidden_states=prompts())
    for answer in each_way(cli, plain, "--set", "sampler.guidance_scale=4"):
        assert_refused(answer, "sampler.guidance_scale", "got 4", "null.*")
    assert cli("submit", "fast-w4a8", "--model", plain, *SET).code == 0


def test_a_sample_size_that_the_config_leaves_open(cli: Cli, home: Path, write: Callable[..., Path]) -> None:
    folder = write(text_unet(sample_size=None), encoder_hidden_states=prompts())
    assert_refused(cli("models", "add", folder), "sample_size null", "--sample-size")
    for size in ("0", "8x", "a", "-8", "8x0"):
        assert cli("models", "add", folder, "--sample-size", size).code == 2
    added = cli("models", "add", folder, "--sample-size", "8x16", "--json").json
    assert cli("models", "show", added["name"], "--json").json["inspection"]["sample_shape"] == [4, 8, 16]
    store = open_store(str(home / "store"))
    files = json.loads(store.get_bytes(added["digest"]))["files"]
    config = json.loads(store.get_bytes(files["denoiser/config.json"]["sha256"]))
    assert config["sample_size"] == [8, 16], "every task reads it from there"
    words = ["submit", "fast-w4a8", *SET, "--sample-size", "8x16", "--model"]
    assert cli(*words, folder).code == 0
    assert [row["digest"] for row in cli("models", "ls", "--json").json] == [added["digest"]]
    assert_refused(cli(*words, added["name"]), "--sample-size", "registered")


@pytest.mark.usefixtures("without_ray")
def test_infinity_on_a_trajectory(cli: Cli, write: Callable[..., Path]) -> None:
    model = unet()
    with torch.no_grad():
        model.conv_out.weight.fill_(3e38)  # finite, and what it predicts is not
    answer = cli("run", "fast-w4a8", "--model", write(model), *SET, "--json")
    assert answer.code == 2
    for word in ("NaN or infinity", "step 0 (timestep", "UNet2DModel predicted it from finite inputs"):
        assert word in answer.json["error"]
    assert answer.json["state"] == "failed"
    assert cli("jobs", "wait", answer.json["job"]).code == 2
    assert "retried" not in cli("jobs", "logs", answer.json["job"]).out


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_a_network_on_signals_becomes_a_release(cli: Cli, write: Callable[..., Path], tmp_path: Path) -> None:
    from diffusers import UNet1DModel

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
        "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
    }
    channels = {"in_channels": 4, "out_channels": 4, "extra_in_channels": 64, "block_out_channels": (32, 64)}
    model = UNet1DModel(sample_size=64, time_embedding_type="fourier", **channels, **blocks)
    words = ["--set", "passes.correct={seeds: 2, held_out_seeds: 1}", "--out", tmp_path / "out", "--json"]
    answer = cli("run", "fast-w4a8", "--model", write(model), *SET, *words)
    assert answer.code == 0, answer.err
    assert answer.json["metrics"]["n"] == 2
    assert answer.json["metrics"]["psnr_db"] > 20
    correction = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert "quantmill" in json.dumps(correction).lower()
