"""Several files as one for the store: a prompts file with the images and arrays that it names; a model's folder."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import RecipeError
from quant_spec.documents import read_plain_file
from quant_spec.errors import InvalidInputError
from quant_spec.prompts import LONGEST_FILE, bundle, read_prompts
from workers.storage.plain_files import file_within

#: A folder of a model of transformers has this file.
CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
#: What of a model's folder is needed to run it; weights in other forms are left out.
_KINDS = (".json", ".txt", ".safetensors")
# Bytes of an image or array that a prompts file names.
_LONGEST_NAMED = 1 << 30


def bundled_folder(path: Path, what: str) -> bytes:
    """Return a model's folder as one archive; it is held in memory, and so has to fit there.

    Raises
    ------
    RecipeError
        If it is no folder with a model's config and safetensors.
    """
    try:
        found = {
            file.name: file_within(file, (path,), what, error=RecipeError).read_bytes()
            for file in sorted(path.iterdir())
            if file.suffix in _KINDS
        }
    except OSError as error:
        raise RecipeError(f"{what}: got {path} ({error.strerror}), wanted a folder of a model") from error
    if missing := {CONFIG, _WEIGHTS} - found.keys():
        raise RecipeError(f"{what}: got {path} without {', '.join(sorted(missing))}, wanted a folder of a model")
    return bundle(b"", found)


def bundled(path: Path) -> bytes | None:
    """Return the bundle of a prompts file; None if it names no files, or cannot be read, which others say.

    Raises
    ------
    RecipeError
        If it is too large, or a file that it names is not there, or lies outside its folder.
    """
    try:
        data = read_plain_file(path, LONGEST_FILE, error=RecipeError, what=f"prompts: {path}")
    except FileNotFoundError:
        return None
    try:
        lines = read_prompts(data)
    except InvalidInputError:
        return None
    names = sorted({file.name for line in lines for file in line.files if not file.data})
    if not names:
        return None
    found = {
        name: file_within(path.parent / name, (path.parent,), f"prompts: {path}", error=RecipeError) for name in names
    }
    try:
        files = {name: read_plain_file(file, _LONGEST_NAMED, error=RecipeError) for name, file in found.items()}
        return bundle(data, files)
    except OSError as error:
        raise RecipeError(f"prompts: {path}: got {error.strerror}, wanted readable files") from error
