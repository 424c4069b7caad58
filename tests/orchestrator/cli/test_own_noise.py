"""Pipelines that draw noise from PyTorch's global generator, from the command line to what a user draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler

from tests.tiny_pipelines import save_sd3

Cli = Callable[..., Any]
SETS = (
    *("sampler.num_inference_steps=3", "calibration.seeds=2", "evaluation.seeds=2", "evaluation.sqnr_seeds=1"),
    *("evaluation.grid=2", "passes.correct={seeds: 2, held_out_seeds: 2, shard_seeds: 2, batch_size: 2}"),
)


@pytest.mark.usefixtures("without_ray")
def test_noise_that_a_pipeline_draws_by_itself_is_the_seeds(cli: Cli, tmp_path: Path) -> None:
    model = save_sd3(tmp_path / "model")
    # Stable Diffusion 3 hands its scheduler no generator, and this one adds noise at every step
    FlowMatchLCMScheduler(shift=3.0).save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "FlowMatchLCMScheduler"]}))
    (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
    words = [word for each in SETS for word in ("--set", each)]
    paths = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "made")
    answer = cli("run", "minmax-w8a8", "--model", model, *words, *paths, "--json")
    assert answer.code == 0, answer.err
    images = []
    for folder in (model, tmp_path / "made"):
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        for seed in range(2):
            torch.manual_seed(seed)
            told = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(seed), "output_type": "np"}
            images.append(pipeline("owl", **told).images[0])
    errors = [np.square(one - other).mean() for one, other in zip(images[:2], images[2:], strict=True)]
    psnr = float(np.mean(-10 * np.log10(errors)))
    assert psnr > 30
    assert answer.json["metrics"]["psnr_db"] == pytest.approx(psnr, abs=0.05)
