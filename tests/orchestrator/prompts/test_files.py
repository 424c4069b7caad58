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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.npy", b"\x93NUMPY")], "got image_embeds a.npy (EOF"),
        ([("a.npy", array(np.array(["text"])))], "got image_embeds a.npy (<U4"),
        ([("a.npy", array(np.array([{}], dtype=object)))], "got image_embeds a.npy (Object arrays cannot be loaded"),
        ([("a.npy", array(np.zeros(3))), ("b.npy", array(np.zeros(4)))], "b.npy of shape (4,) beside one of (3,)"),
    ],
)
def test_arrays_are_of_numbers_and_of_one_shape(files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_files(lines("image_embeds", files), "told")
    assert message in str(raised.value)


def test_arrays_of_one_shape_are_taken() -> None:
    check_files(lines("image_embeds", [(f"{n}.npy", array(np.full((2, 3), n))) for n in range(3)]), "told")
