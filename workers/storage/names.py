"""Names of releases, and paths inside artifacts: what is accepted, so that nothing odd ever reaches a file system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from workers.errors import ManifestError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}\Z")
# A part of a path may have capitals (README.md), start with an underscore, and must not end in a dot.
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?\Z")
_DEEPEST = 8


def check_name(name: str) -> str:
    """Return a name of a release, alias or model if it matches `[a-z0-9][a-z0-9._-]{0,127}`; else ManifestError."""
    if not _NAME.match(name):
        raise ManifestError(f"name: got {name[:140]!r}, wanted 1 to 128 of a-z 0-9 . _ - with a letter or digit first")
    return name


def check_path(path: str) -> PurePosixPath:
    """Return a path inside an artifact if it is relative and plain.

    Raises
    ------
    ManifestError
        If it is absolute, climbs, has an empty part, a backslash, a drive, a control character or any other
        character than letters, digits, `.`, `_`, `-`, or is more than 8 parts deep.
    """
    parts = path.split("/")
    if len(parts) > _DEEPEST or not all(_PART.match(part) for part in parts):
        raise ManifestError(f"path in an artifact: got {path[:200]!r}, wanted plain relative names joined by /")
    return PurePosixPath(path)


def check_paths(paths: Iterable[str]) -> list[PurePosixPath]:
    """Return paths that can lie side by side in a folder; else ManifestError.

    No two may be equal but for case (they would be one file on some systems), and none may be the folder of another.
    """
    checked = [check_path(path) for path in paths]
    files: set[str] = set()
    for path in checked:
        if str(path).casefold() in files:
            raise ManifestError(f"paths in an artifact: got {str(path)!r} twice but for case, wanted it once")
        files.add(str(path).casefold())
    for path in checked:
        for folder in path.parents:
            if str(folder).casefold() in files:
                raise ManifestError(f"paths in an artifact: got {str(folder)!r} as a file and a folder, wanted one")
    return checked
