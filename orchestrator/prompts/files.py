"""Whether the images and arrays that a prompts file names can be read, before any task is queued that reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence

from orchestrator.errors import RecipeError
from quant_spec.pictures import PictureKindError, read_picture
from quant_spec.prompts import PromptFile, PromptLine

#: Kinds of numbers that PyTorch has, too.
_NUMBERS = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def check_files(lines: Sequence[PromptLine], where: str, *, any_size: bool = False, hint: str = "") -> None:
    """Read every file that lines name, each once.

    Parameters
    ----------
    where
        What messages call the prompts file.
    any_size
        Whether the pictures of a column may differ in size, as the pipeline brings them to one that it is told.
    hint
        What else would do where they may not.

    Raises
    ------
    RecipeError
        If a picture is damaged or has no one meaning, or an array is damaged, empty, of objects or not finite; or
        arrays of one column differ in shape, pictures in size.
    """
    firsts: dict[str, tuple[bool, tuple[int, ...]]] = {}
    seen: set[str] = set()
    for line in lines:
        for column, file in line.more:
            if not isinstance(file, PromptFile) or f"{column} {file.name}" in seen:
                continue
            seen.add(f"{column} {file.name}")
            shape = _read(column, file, where)
            is_image, first = firsts.setdefault(column, (file.is_image, shape))
            if file.is_image is is_image and (shape == first or (is_image and any_size)):
                continue
            what, wanted = ("pixels", f"one size{hint}") if file.is_image else ("numbers", "one shape")
            got, beside = (" x ".join(map(str, each)) or "no" for each in (shape, first))
            raise RecipeError(
                f"prompts: {where}: got {column} {file.name} of {got} {what} beside one of {beside}, wanted {wanted}"
            )


def _read(column: str, file: PromptFile, where: str) -> tuple[int, ...]:
    """Read a file to its end; return an array's shape, a picture's height and width."""
    wanted = "a picture that is whole" if file.is_image else "an array of numbers, as numpy.save writes it"
    try:
        return read_picture(file.data, only_check=True).size if file.is_image else _array_shape(file.data)
    except PictureKindError as error:
        said, wanted = str(error), "an opaque picture of 8 or 16 bits"
    except (OSError, ValueError, EOFError, SyntaxError, Warning) as error:
        said = " ".join(str(error).split()).partition(" <")[0] or type(error).__name__
    raise RecipeError(f"prompts: {where}: got {column} {file.name} ({said}), wanted {wanted}")


def _array_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape of an array of numbers."""
    import numpy as np  # only where a prompts file names arrays

    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.name not in _NUMBERS or not array.dtype.isnative:
        raise ValueError(f"{getattr(array, 'dtype', type(array).__name__)}")
    if not array.size:
        raise ValueError("no numbers")
    if not np.isfinite(array).all():
        raise ValueError("numbers that are not finite")
    shape: tuple[int, ...] = array.shape
    return shape
