"""How well images fit their prompts by a CLIP model of the user's (Hessel et al. 2021), by torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import QuantCoreError
from quant_core.metrics.images import to_uint8


class _Features:
    """What torchmetrics asks a CLIP model for, as tensors: newer versions of transformers give more."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> _Features:
        self.model.to(device)
        return self

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(*inputs))


def _pooled(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


class ClipScore:
    """A CLIP model of transformers in a folder; nothing is downloaded.

    Raises
    ------
    QuantCoreError
        If the folder holds no such model.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor  # seconds of import: only where it is asked for

        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise QuantCoreError(
                f"evaluation.clip: got a folder that does not load ({reason}), wanted a CLIP model of transformers "
                "with its tokenizer and preprocessor"
            ) from error
        self.features = _Features(model.eval()).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Return 100 times the cosine of each image and its prompt, at least 0.

        Parameters
        ----------
        images : Tensor, shape (n, 3, H, W), dtype float32, in [-1, 1]
        prompts : sequence of n str
        """
        from torchmetrics.functional.multimodal import clip_score

        parts: Any = (self.features, self.processor)
        scores = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of prompts that are cut to the model's length
            for image, prompt in zip(to_uint8(images), prompts, strict=True):  # one by one: it gives a mean alone
                scores.append(float(clip_score(image.to(self.device), prompt, model_name_or_path=lambda: parts)))
        return scores
