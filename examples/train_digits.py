"""Train the small class-conditional diffusion model of examples/models/digits on scikit-learn's handwritten digits.

    python -m examples.train_digits                       # about five minutes on one core
    python -m examples.train_digits --samples digits.png  # also draw eight samples of each class

The 1,797 digits of 8x8 pixels are enlarged to 16x16 and shown to a UNet with everything that the large ones have: skip
concatenations, time projections, class embeddings and attention. The seed is fixed; on one machine, with one number of
threads, the same weights come out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).parent / "models" / "digits"
CLASSES = 10
SIZE = 16
SEED = 0
STEPS = 2800
BATCH = 64
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
EMA_DECAY = 0.995


def load_images() -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 16, 16) in [-1, 1] and labels (N,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(digits.target).long()


def make_model() -> UNet2DModel:
    """Return the untrained UNet, 0.44 M parameters."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=CLASSES,
    )


def make_scheduler() -> DDPMScheduler:
    """Return the noise schedule that the model is trained for."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")


def learning_rate(step: int, steps: int) -> float:
    """Fraction of the peak rate: linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(steps: int) -> UNet2DModel:
    """Return the digits model after `steps`."""
    torch.manual_seed(SEED)
    images, labels = load_images()

    def batch() -> tuple[Tensor, Tensor | None]:
        rows = torch.randint(len(images), (BATCH,))
        return images[rows], labels[rows]

    return train_model(make_model(), make_scheduler(), batch, steps)


def train_model(
    model: UNet2DModel,
    scheduler: DDPMScheduler,
    batch: Callable[[], tuple[Tensor, Tensor | None]],
    steps: int,
    peak: float = PEAK_LEARNING_RATE,
) -> UNet2DModel:
    """Return the exponential moving average of the weights after `steps` on batches of images and their labels."""
    ema = EMAModel(model.parameters(), decay=EMA_DECAY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    begin, recent = time.monotonic(), 0.0
    for step in range(steps):
        clean, labels = batch()
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(scheduler.config["num_train_timesteps"], (len(clean),))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        velocity = scheduler.config["prediction_type"] == "v_prediction"
        target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        loss = F.mse_loss(model(noisy, timesteps, labels).sample, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        recent += (loss.item() - recent) / min(step + 1, 100)
        if step % 200 == 199:
            print(f"step {step + 1} of {steps}, loss {recent:.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    ema.copy_to(model.parameters())
    return model.eval()


@torch.no_grad()
def sample(model: UNet2DModel, per_class: int, steps: int = 50) -> Tensor:
    """Return DDIM samples (CLASSES, per_class, 16, 16) in [-1, 1], one row for each class."""
    scheduler = DDIMScheduler.from_config(make_scheduler().config)
    scheduler.set_timesteps(steps)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    x = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep, labels).sample, timestep, x).prev_sample
    return x.clamp(-1, 1).reshape(CLASSES, per_class, SIZE, SIZE)


def draw(samples: Tensor, path: Path) -> None:
    """Write samples (rows, columns, height, width) as one PNG, four times enlarged."""
    framed = F.pad(samples, (1, 1, 1, 1), value=-1.0)
    grid = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    image = Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).numpy())
    image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Train, save in the diffusers format, and draw samples if asked."""
    parser = argparse.ArgumentParser(description="Train the digits model.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write unet/ and scheduler/ to")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--samples", type=Path, help="PNG to draw samples to")
    options = parser.parse_args()
    model = train(options.steps)
    model.save_pretrained(options.out / "unet")
    make_scheduler().save_pretrained(options.out / "scheduler")
    if options.samples:
        draw(sample(model, per_class=8), options.samples)


if __name__ == "__main__":
    main()
