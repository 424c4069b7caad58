"""PTQD's correction of whole pipelines from the command line: fitted in the pipeline's call, and loaded with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.tiny_pipelines import save_dit, save_sd3

Cli = Callable[..., Any]
CORRECT = "passes.correct={seeds: 4, held_out_seeds: 2, shard_seeds: 2, batch_size: 2}"
SETS = (
    *("sampler.num_inference_steps=3", "sampler.guidance_scale=4", "weights.bits=3", "calibration.seeds=2", CORRECT),
    *("evaluation.seeds=2", "evaluation.shard_seeds=2", "evaluation.sqnr_seeds=1", "evaluation.grid=2"),
)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("save", "told"),
    [
        pytest.param(save_dit, {"class_labels": [0]}, id="dit"),
        pytest.param(save_sd3, {"prompt": "a red cup"}, id="sd3", marks=pytest.mark.slow),
    ],
)
def test_a_release_corrects_predictions_wherever_it_is_loaded(
    save: Callable[[Path], Path], told: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    words = [word for each in SETS for word in ("--set", each)]
    answer = cli(
        "run", "minmax-w8a8", "--model", save(tmp_path / "model"), *words, "--out", tmp_path / "made", "--json"
    )
    assert answer.code == 0, answer.err
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert index["scheduler"] == ["quant_core.corrected_scheduler", "QuantmillCorrectedScheduler"]

    def draw(pipeline: Any) -> np.ndarray[Any, Any]:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images: np.ndarray[Any, Any] = pipeline(
            **told, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="np"
        ).images
        return images

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "made", dtype=torch.float32)
    assert type(loaded.scheduler).__name__ == "QuantmillCorrectedScheduler"
    corrected = draw(loaded)
    loaded.scheduler = loaded.scheduler.wrapped
    assert np.abs(draw(loaded) - corrected).max() > 1e-4
