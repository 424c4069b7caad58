"""The CLIP score of images and prompts, by a tiny random model that is loaded as a user's is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from quant_core.errors import QuantCoreError
from quant_core.metrics.clip_score import ClipScore
from quant_core.metrics.images import to_uint8
from tests.tiny_families import save_clip

PROMPTS = ["red heart", "blue car", "owl"]


def test_it_is_a_hundred_times_the_cosine(tmp_path: Path) -> None:
    score = ClipScore(save_clip(tmp_path))
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images)]
    inputs = score.processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = score.features.model(**inputs)
    wanted = 100 * F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0)
    torch.testing.assert_close(torch.tensor(score(images, PROMPTS)), wanted, rtol=1e-3, atol=1e-2)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(QuantCoreError, match=r"evaluation.clip: got a folder that does not load"):
        ClipScore(tmp_path)
