"""A prompts file with the images and arrays that it names, as one file for the store."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import RecipeError
from quant_spec.errors import InvalidInputError
from quant_spec.prompts import bundle, read_prompts
from workers.storage.plain_files import file_within


def bundled(path: Path) -> bytes | None:
    """Return the bundle of a prompts file; None if it names no files, or cannot be read, which others say.

    Raises
    ------
    RecipeError
        If a file that it names is not there, or lies outside its folder.
    """
    try:
        data = path.read_bytes()
        lines = read_prompts(data)
    except (InvalidInputError, OSError):
        return None
    names = sorted({file.name for line in lines for file in line.files if not file.data})
    if not names:
        return None
    found = {
        name: file_within(path.parent / name, (path.parent,), f"prompts: {path}", error=RecipeError) for name in names
    }
    try:
        return bundle(data, {name: file.read_bytes() for name, file in found.items()})
    except OSError as error:
        raise RecipeError(f"prompts: {path}: got {error.strerror}, wanted readable files") from error
