"""Train two more small models, on other images, with other schedules and other attention than those that ship.

    python -m examples.train_others FOLDER                # about ten minutes on two cores
    python -m examples.train_others FOLDER --only photos

"photos": crops of scikit-learn's two sample photographs, 32x32 in colour; linear schedule, epsilon prediction, no
classes, attention at 16x16. No recipe's setting was chosen on it: it is there to see what recipes do on a model that
nobody tuned them for. "glyphs": letters and signs of Pillow's font, 32x32 in grey, at random sizes, places and angles;
scaled linear schedule, velocity prediction, 94 classes, attention at 16x16 and 8x8 with heads of 16.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from torch import Tensor

from examples.train_digits import SEED, train_model

SIZE = 32
BATCH = 16
STEPS = 1500
PEAK_LEARNING_RATE = 5e-4
SIGNS = "".join(sign for sign in string.printable if not sign.isspace())
_CROP = (48, 160)  # pixels, of photographs of 427 x 640
_GLYPHS_EACH = 24

Batch = Callable[[], tuple[Tensor, Tensor | None]]


def photos() -> tuple[UNet2DModel, DDPMScheduler, Batch]:
    """Return an untrained model of photographs (3.1 M parameters), its noise schedule, and what draws a batch."""
    images = [Image.fromarray(image) for image in load_sample_images().images]
    model = UNet2DModel(
        sample_size=SIZE,
        layers_per_block=1,
        block_out_channels=(48, 80, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=40,
        norm_num_groups=16,
    )

    def crop() -> np.ndarray:
        image = images[int(torch.randint(len(images), ()))]
        side = int(torch.randint(*_CROP, ()))
        left, top = (int(torch.randint(length - side, ())) for length in image.size)
        part = image.resize((SIZE, SIZE), Image.Resampling.BOX, (left, top, left + side, top + side))
        return np.asarray(part)[:, :: -1 if torch.rand(()) < 0.5 else 1]

    def batch() -> tuple[Tensor, None]:
        crops = torch.from_numpy(np.stack([crop() for _ in range(BATCH)]))
        return crops.permute(0, 3, 1, 2).float() / 127.5 - 1, None

    return model, DDPMScheduler(beta_schedule="linear"), batch


def glyphs() -> tuple[UNet2DModel, DDPMScheduler, Batch]:
    """Return an untrained model of letters (1.9 M parameters), its noise schedule, and what draws a batch."""
    model = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(SIGNS),
    )
    random = np.random.default_rng(SEED)
    drawn = torch.stack([_glyph(sign, random) for sign in SIGNS for _ in range(_GLYPHS_EACH)])

    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(drawn), (BATCH,))
        return drawn[rows], rows // _GLYPHS_EACH

    return model, DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"), batch


def _glyph(sign: str, random: np.random.Generator) -> Tensor:
    """Draw a sign as an image (1, 32, 32) in [-1, 1]."""
    image = Image.new("L", (2 * SIZE, 2 * SIZE))
    middle = tuple(SIZE + random.uniform(-8, 8) for _ in range(2))
    ImageDraw.Draw(image).text(middle, sign, 255, ImageFont.load_default(random.uniform(30, 56)), anchor="mm")
    image = image.rotate(random.uniform(-20, 20), Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(image).copy())[None].float() / 127.5 - 1


MODELS = {"photos": photos, "glyphs": glyphs}


def main() -> None:
    """Train, and save in the diffusers format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written to: a folder for each model, with unet/ and scheduler/")
    parser.add_argument("--only", choices=MODELS, help="train one of them")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    for name in [options.only] if options.only else MODELS:
        torch.manual_seed(SEED)
        untrained, scheduler, batch = MODELS[name]()
        model = train_model(untrained, scheduler, batch, options.steps, PEAK_LEARNING_RATE)
        model.save_pretrained(options.folder / name / "unet")
        scheduler.save_pretrained(options.folder / name / "scheduler")


if __name__ == "__main__":
    main()
