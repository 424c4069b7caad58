"""Files that a prompts file names are read before a task is queued that needs them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.errors import RecipeError
from orchestrator.prompts.files import check_files
from quant_spec.prompts import PromptFile, PromptLine


def picture(kind: str, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 4), dtype=np.uint8)
    noise[..., 3] = 255
    Image.fromarray(noise, "RGBA").convert(mode).save(data, kind)
    return data.getvalue()


def array(value: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, value, allow_pickle=True)
    return data.getvalue()


def lines(column: str, files: Sequence[tuple[str, bytes]]) -> list[PromptLine]:
    return [PromptLine(prompt="owl", more=((column, PromptFile(name, data)),)) for name, data in files]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_whole_pictures_are_taken_and_parts_of_them_are_not(kind: str) -> None:
    whole = picture(kind)
    check_files(lines("image", [(f"a.{kind}", whole)]), "told")
    with pytest.raises(
        RecipeError, match=rf"prompts: told: got image a\.{kind} \(.+\), wanted a picture that is whole"
    ):
        check_files(lines("image", [(f"a.{kind}", whole[: len(whole) // 2])]), "told")


def test_masks_of_any_mode_are_taken() -> None:
    check_files(
        lines("mask_image", [(f"{mode}.png", picture("PNG", mode)) for mode in ("1", "L", "P", "RGBA")]), "told"
    )
    check_files(lines("image", [("a.jpg", picture("JPEG", "CMYK"))]), "told")


def transparent(mode: str) -> bytes:
    """Return a picture of which one pixel can be seen through."""
    data = io.BytesIO()
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 254 if mode == "RGBA" else 0))
    image.convert(mode).save(data, "PNG")
    return data.getvalue()


def animation() -> bytes:
    data = io.BytesIO()
    first, *others = (Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 90, 180))
    first.save(data, "WEBP", save_all=True, append_images=others)
    return data.getvalue()


def deep() -> bytes:
    data = io.BytesIO()
    Image.new("F", (8, 8)).save(data, "TIFF")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (transparent("RGBA"), r"\(transparent pixels, .+\), wanted an opaque picture"),
        (transparent("LA"), r"\(transparent pixels, .+\), wanted an opaque picture"),
        (animation(), r"\(an animation of 3 pictures\), wanted"),
        (deep(), r"\(pixels of kind F\), wanted an opaque picture of 8 or 16 bits"),
    ],
    ids=["RGBA", "LA", "animation", "float"],
)
def test_pictures_without_one_meaning_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"prompts: told: got image a\.png {message}"):
        check_files(lines("image", [("a.png", data)]), "told")


def test_pictures_of_a_column_are_of_one_size_unless_the_pipeline_brings_them_to_one() -> None:
    data = []
    for size in ((8, 16), (16, 8)):
        data.append(io.BytesIO())
        Image.new("RGB", size).save(data[-1], "PNG")
    told = lines("image", [(f"{place}.png", each.getvalue()) for place, each in enumerate(data)])
    with pytest.raises(
        RecipeError, match=r"got image 1\.png of 8 x 16 pixels beside one of 16 x 8, wanted one size, or"
    ):
        check_files(told, "told", hint=", or --size")
    check_files(told, "told", any_size=True)
    mixed = [*told, *lines("image", [("a.npy", array(np.zeros((3, 16, 8))))])]
    with pytest.raises(RecipeError, match=r"got image a\.npy of 3 x 16 x 8 numbers beside one of 16 x 8"):
        check_files(mixed, "told", any_size=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.npy", b"\x93NUMPY")], "got image_embeds a.npy (EOF"),
        ([("a.npy", array(np.array(["text"])))], "got image_embeds a.npy (<U4"),
        ([("a.npy", array(np.array([{}], dtype=object)))], "got image_embeds a.npy (Object arrays cannot be loaded"),
        ([("a.npy", array(np.zeros(3))), ("b.npy", array(np.zeros(4)))], "b.npy of 4 numbers beside one of 3, wanted"),
        ([("a.npy", array(np.array([1.0, np.nan])))], "got image_embeds a.npy (numbers that are not finite)"),
        ([("a.npy", array(np.zeros(0)))], "got image_embeds a.npy (no numbers)"),
        ([("a.npy", array(np.zeros(3, ">f4")))], "got image_embeds a.npy (>f4)"),
    ],
)
def test_arrays_are_of_numbers_and_of_one_shape(files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_files(lines("image_embeds", files), "told")
    assert message in str(raised.value)


def test_arrays_of_one_shape_are_taken() -> None:
    check_files(lines("image_embeds", [(f"{n}.npy", array(np.full((2, 3), n))) for n in range(3)]), "told")
