"""A network whose last layer is zero, as many are when training begins: predictions are 0 in both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

Cli = Callable[..., Any]

SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "2",
    "evaluation.seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}


@pytest.mark.usefixtures("without_ray")
def test_samples_that_are_equal_have_finite_metrics(cli: Cli, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    torch.nn.init.zeros_(model.conv_out.weight)
    torch.nn.init.zeros_(model.conv_out.bias)
    model.save_pretrained(tmp_path / "zero" / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "zero" / "scheduler")
    words = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    view = cli("run", "minmax-w8a8", "--model", tmp_path / "zero", *words, "--json").json
    assert (view["state"], view["error"]) == ("succeeded", None)
    assert view["metrics"]["psnr_db"] == 144.0
    assert view["metrics"]["psnr_db_ci95"] == 0.0
    assert view["metrics"]["fd"] < 1e-3
    assert cli("report", view["job"], "--out", tmp_path / "report.html").code == 0
