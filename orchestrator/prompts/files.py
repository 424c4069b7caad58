"""Whether the images and arrays that a prompts file names can be read, before any task is queued that reads them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from orchestrator.errors import RecipeError
from quant_spec.prompts import PromptFile, PromptLine

#: Sides, in pixels, that a JPEG may be decoded to: enough to see that all of it is there, in a fraction of the time.
_SMALL = (64, 64)


def check_files(lines: Sequence[PromptLine], where: str) -> None:
    """Read every file that lines name, each once.

    Raises
    ------
    RecipeError
        If an image or an array is damaged, empty or of objects, or arrays of one column differ in shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[str] = set()
    for line in lines:
        for column, file in line.more:
            if not isinstance(file, PromptFile) or f"{column} {file.name}" in seen:
                continue
            seen.add(f"{column} {file.name}")
            shape = _read(column, file, where)
            if shape is not None and shapes.setdefault(column, shape) != shape:
                raise RecipeError(
                    f"prompts: {where}: got {column} {file.name} of shape {shape} beside one of {shapes[column]}, "
                    "wanted one shape"
                )


def _read(column: str, file: PromptFile, where: str) -> tuple[int, ...] | None:
    """Read a file to its end; return an array's shape, None for an image."""
    wanted = "a picture that is whole" if file.is_image else "an array of numbers, as numpy.save writes it"
    try:
        if not file.is_image:
            return _array_shape(file.data)
        _decode(file.data)
    except (OSError, ValueError, EOFError, SyntaxError, Warning) as error:
        said = " ".join(str(error).split()).partition(" <")[0] or type(error).__name__
        raise RecipeError(f"prompts: {where}: got {column} {file.name} ({said}), wanted {wanted}") from error
    return None


def _decode(data: bytes) -> None:
    """Decode an image to its end; a bomb of pixels is an error, not a warning."""
    from PIL import Image  # only where a prompts file names images

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", _SMALL)
            image.load()


def _array_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape of an array of numbers."""
    import numpy as np  # only where a prompts file names arrays

    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise ValueError(f"{getattr(array, 'dtype', type(array).__name__)}")
    shape: tuple[int, ...] = array.shape
    return shape
