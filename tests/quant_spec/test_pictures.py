"""Pictures that a prompts file names, as pipelines are given them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quant_spec.pictures import PictureKindError, read_picture

#: Upright: 2 pixels high, 3 wide, each of another gray.
PIXELS = np.array([[0, 50, 100], [150, 200, 250]], np.uint8)
#: How pixels lie in a file whose EXIF says so, by the standard's number.
STORED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.T,
    6: PIXELS.T[::-1],
    7: PIXELS.T[::-1, ::-1],
    8: PIXELS.T[:, ::-1],
}


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation])).convert("RGB")
    data = saved(image, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    read = read_picture(data)
    assert np.array_equal(np.asarray(read.image), np.stack([PIXELS] * 3, -1))
    assert read.size == PIXELS.shape == read_picture(data, only_check=True).size


@pytest.mark.parametrize("orientation", [0, 9, 40_000])
def test_an_orientation_that_is_none_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert read_picture(saved(Image.fromarray(PIXELS), exif=exif.tobytes())).size == PIXELS.shape


def test_sixteen_bits_of_gray_are_brought_to_eight() -> None:
    values = np.array([[0, 128, 129, 257, 30_000, 65_535]], np.uint16)
    read = read_picture(saved(Image.fromarray(values)))
    assert np.asarray(read.image)[0].tolist() == [[level] * 3 for level in (0, 0, 1, 1, 117, 255)]


def test_a_palette_is_looked_up() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.putpixel((1, 0), 1)
    read = read_picture(saved(image))
    assert np.asarray(read.image).tolist() == [[[1, 2, 3], [4, 5, 6]]]
    with pytest.raises(PictureKindError, match="transparent pixels"):
        read_picture(saved(image, transparency=1))


def test_a_large_picture_is_checked_without_all_of_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.new("RGB", (900, 600)), "JPEG", exif=exif.tobytes())
    checked = read_picture(data, only_check=True)
    assert checked.size == (900, 600)
    assert checked.image.size < (600, 900)
    assert read_picture(data).image.size == (600, 900)
