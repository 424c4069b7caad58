"""One family's tiny pipeline from the command line to images: add, run, pull, load as a user does, call."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from quant_core.nn.layers import QuantLayer
from tests.tiny_families import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Calls the command line with words; raises `RefusedError` with what it said, where it ends otherwise than by success.
Run = Callable[..., None]


class RefusedError(Exception):
    """What the command line said."""


@dataclass(slots=True)
class Outcome:
    """What became of a family.

    Attributes
    ----------
    pipeline : str
        Its class.
    refused : str, optional
        What was said to it.
    layers : int
        Quantized ones.
    psnr_db : float
        Of images against full precision.
    images : mapping of str to array, (n, ..., H, W, 3)
        What the release drew, by dtype.
    """

    pipeline: str
    refused: str | None = None
    layers: int = 0
    psnr_db: float = float("nan")
    images: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def settings(name: str, *, seeds: int = 2) -> list[str]:
    """Return the overrides of a recipe for a tiny family, as words of the command line."""
    family = FAMILIES[name]
    values = {
        "sampler.num_inference_steps": family.steps,
        "sampler.arguments": json.dumps(dict(family.arguments)),
        "calibration.seeds": seeds,
        "evaluation.seeds": seeds,
        "evaluation.sqnr_seeds": 1,
        "evaluation.grid": 2,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def quantize(name: str, folder: Path, run: Run, recipe: str, more: Sequence[str] = ()) -> Path:
    """Make a family in a folder, quantize it, and return the folder of its release."""
    family = FAMILIES[name]
    family.save(folder / name)
    prompts = family.write_inputs(folder / f"{name}-inputs")
    run("models", "add", folder / name)
    release = folder / f"{name}-release"
    run("run", recipe, "--model", name, "--prompts", prompts, *settings(name), *more, "--out", release)
    return release


def load(release: Path, dtype: torch.dtype) -> Any:
    """Load a release as a user does."""
    pipeline = DiffusionPipeline.from_pretrained(release, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, name: str, inputs: Path, dtype: torch.dtype, **more: Any) -> np.ndarray[Any, Any]:
    """Call a family's release as a user does, with the first line of its inputs; return what it drew."""
    told = FAMILIES[name].inputs(inputs, dtype) | more
    output = pipeline(**told, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)
    return np.asarray(output[0])


def run_family(name: str, folder: Path, run: Run, recipe: str) -> Outcome:
    """Take a family all the way, or as far as it is not refused."""
    try:
        release = quantize(name, folder, run, recipe)
    except RefusedError as error:
        index = json.loads((folder / name / "model_index.json").read_text())
        return Outcome(index["_class_name"], refused=str(error))
    outcome = Outcome(json.loads((release / "model_index.json").read_text())["_class_name"])
    outcome.psnr_db = json.loads((release / "metrics.json").read_text())["psnr_db"]
    for kind, dtype in DTYPES.items():
        pipeline = load(release, dtype)
        outcome.images[kind] = draw(pipeline, name, folder / f"{name}-inputs", dtype)
        denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        outcome.layers = sum(isinstance(module, QuantLayer) for module in denoiser.modules())
    return outcome
