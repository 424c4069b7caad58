"""Strips of sample images as data URIs, ready to stand in an HTML file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Pixels between two images of a strip.
GAP = 2
#: What the difference of two images is multiplied by.
GAIN = 4
# Of images that are made smaller: visibly the same in a tenth of the bytes.
_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Strips:
    """The same seeds three times, as data URIs: full precision, quantized, and their difference times `gain`."""

    seeds: tuple[int, ...]
    width: int
    reference: str
    quantized: str
    difference: str
    gain: int
    prompts: tuple[str, ...] = ()


def make_strips(
    reference: NDArray[np.float32],
    quantized: NDArray[np.float32],
    seeds: tuple[int, ...],
    prompts: tuple[str, ...] = (),
    *,
    most: int | None = None,
) -> Strips:
    """Draw one strip of images for each side and one of their difference times `GAIN`, in which grey means none.

    Parameters
    ----------
    reference, quantized : shape (n, channels, height, width), float32, in [-1, 1]
        Samples of the same seeds. One or three channels are shown as they are, of any other number the first.
    seeds
        The n seeds.
    prompts
        What each sample's pipeline was told; none for a bare denoiser.
    most
        Pixels of an image's longer side; larger ones are made smaller, and are no longer exact.
    """
    if reference.shape != quantized.shape or reference.ndim != 4 or len(reference) != len(seeds):
        got = f"{reference.shape} and {quantized.shape}"
        raise ValueError(f"samples: got shapes {got} for {len(seeds)} seeds, wanted (n, c, h, w) twice")
    delta = (quantized - reference) / 2 * GAIN
    return Strips(
        seeds=seeds,
        width=(reference.shape[3] + GAP) * len(seeds) - GAP,
        reference=_strip((reference + 1) / 2, most),
        quantized=_strip((quantized + 1) / 2, most),
        difference=_strip(delta + 0.5, most),
        gain=GAIN,
        prompts=prompts,
    )


def _strip(images: NDArray[np.floating], most: int | None) -> str:
    """Return images (n, c, h, w) in [0, 1], beside one another on white, as a data URI: PNG, or WebP if smaller."""
    pixels = np.clip(np.nan_to_num(images) * 255 + 0.5, 0, 255).astype(np.uint8)
    count, channels, height, width = pixels.shape
    if channels not in (1, 3):
        pixels, channels = pixels[:, :1], 1
    canvas = np.full((height, (width + GAP) * count - GAP, channels), 255, dtype=np.uint8)
    for index, image in enumerate(pixels):
        left = index * (width + GAP)
        canvas[:, left : left + width] = image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    strip = Image.fromarray(canvas if channels == 3 else canvas[:, :, 0])
    kind = "png"
    if most is not None and max(height, width) > most:
        kind, share = "webp", most / max(height, width)
        strip = strip.resize((max(1, round(strip.width * share)), max(1, round(strip.height * share))))
        strip.save(buffer, format="WEBP", quality=_QUALITY)
    else:
        strip.save(buffer, format="PNG", optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
