"""Pictures that a prompts file names, as pipelines are given them: upright, in 8-bit RGB.

What a file says otherwise is followed where it has one meaning (the orientation in its EXIF, palettes, gray of 16
bits), and refused where it has several: what is behind transparent pixels, which picture of an animation is meant.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

#: Modes of Pillow that become RGB without a choice; those with transparency do if nothing is transparent.
_MODES = ("1", "L", "P", "RGB", "LA", "La", "PA", "RGBA", "RGBa", "CMYK", "YCbCr")
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")
#: Sides, in pixels, that a JPEG may be decoded to: enough to see that all of it is there, in a fraction of the time.
_SMALL = (64, 64)
#: Phones write them: the picture, and behind it others for the phone's own use.
_MULTIPLE = "MPO"
_ORIENTATION, _UPRIGHT, _TURNED = 0x0112, 1, (5, 6, 7, 8)


class PictureKindError(ValueError):
    """A picture is whole, and has no one meaning."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was read; `size` is (height, width) in pixels, upright."""

    size: tuple[int, int]
    image: Image.Image


def read_picture(data: bytes, *, only_check: bool = False) -> Picture:
    """Read a picture to its end.

    Parameters
    ----------
    data
        A file's bytes, in any format that Pillow knows.
    only_check
        The image may be smaller than the file's.

    Raises
    ------
    PictureKindError
        If it has no one meaning.
    OSError, ValueError, SyntaxError, Warning
        If it is damaged, or too large to be one.
    """
    from PIL import Image, ImageOps  # only where a prompts file names pictures

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames > 1 and opened.format != _MULTIPLE:
                raise PictureKindError(f"an animation of {frames} pictures")
            width, height = opened.size
            orientation = _orientation(opened)
            if only_check:
                opened.draft("RGB", _SMALL)
            opened.load()
            made = _as_rgb(opened)
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    made.info["exif"] = exif.tobytes()
    return Picture((width, height) if orientation in _TURNED else (height, width), ImageOps.exif_transpose(made))


def _orientation(image: Image.Image) -> int:
    """Return how a picture is turned by what its EXIF says; upright where that cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # a block that anyone may have written, read by code that raises anything
        return _UPRIGHT
    return found if isinstance(found, int) and _UPRIGHT <= found <= _TURNED[-1] else _UPRIGHT


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return an image in 8-bit RGB."""
    if image.mode in _SIXTEEN:
        # Pillow's own conversion makes all above 255 white
        return image.point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode not in _MODES:
        raise PictureKindError(f"pixels of kind {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise PictureKindError("transparent pixels, which say nothing of what is behind them")
    return image.convert("RGB")
