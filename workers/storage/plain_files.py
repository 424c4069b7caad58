"""Files that somebody else names, in a recipe or a model folder: plain ones, and in places that the user meant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quant_spec.errors import InvalidInputError


def file_within(path: Path, roots: Sequence[Path], what: str, *, error: type[Exception] = InvalidInputError) -> Path:
    """Return where a file really lies, all links followed, if that is in one of some folders.

    Parameters
    ----------
    path
        As it was named.
    roots
        Folders, or single files, in any form; what is not there allows nothing.
    what
        Named at the beginning of a refusal.
    error
        Raised by a refusal, with one line.

    Raises
    ------
    InvalidInputError
        Or `error`: if there is no such file, it is a folder, pipe, socket or device, or lies elsewhere. What lies
        elsewhere is not even looked at, so that a refusal does not say what there is.
    """
    try:
        real = path.resolve()
        places = [root.expanduser().resolve() for root in roots]
    except (OSError, RuntimeError, ValueError) as problem:
        # A circle of links, or a name that no file can have.
        raise error(f"{what}: got {str(path)[:200]!r}, which leads nowhere, wanted a file") from problem
    if not any(real == place or place in real.parents for place in places):
        raise error(
            f"{what}: got {path}, which is not below {places[0]}, wanted a file there, or --allow-path {real.parent}"
        )
    if not real.exists():
        raise error(f"{what}: got {path} (No such file or directory), wanted a readable file")
    if not real.is_file():
        raise error(f"{what}: got {path}, which is no plain file, wanted a readable file")
    return real
