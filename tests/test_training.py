"""The script that trains the models that no recipe was tuned on: it draws batches that fit them, and they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from examples import train_others
from examples.train_digits import SEED


@pytest.mark.parametrize("name", train_others.MODELS)
def test_a_model_is_trained_and_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_others, "BATCH", 2)
    monkeypatch.setattr("sys.argv", ["train_others", str(tmp_path), "--only", name, "--steps", "1"])
    train_others.main()
    torch.manual_seed(SEED)
    untrained, scheduler, batch = train_others.MODELS[name]()
    images, labels = batch()
    assert images.shape == (2, untrained.config["in_channels"], 32, 32)
    assert images.abs().max() <= 1
    assert images.std() > 0.1
    trained = UNet2DModel.from_pretrained(tmp_path / name / "unet")
    assert trained(images, torch.tensor(500), class_labels=labels).sample.shape == images.shape
    assert not torch.equal(trained.conv_in.weight, untrained.conv_in.weight)
    saved = DDPMScheduler.from_pretrained(tmp_path / name / "scheduler")
    assert saved.config["prediction_type"] == scheduler.config["prediction_type"]
