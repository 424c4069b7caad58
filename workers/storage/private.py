"""Folders and files for their owner alone, whatever the umask: a home, its store, caches and scratch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

FOLDER_MODE, FILE_MODE = 0o700, 0o600


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for their owner alone; one that is there stays as it is.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    missing = []
    for each in (folder, *folder.parents):
        if each.is_dir():
            break
        missing.append(each)
    for each in reversed(missing):
        # With its mode from the first moment; the umask could only take away from it, which the change mends.
        each.mkdir(mode=FOLDER_MODE, exist_ok=True)
        each.chmod(FOLDER_MODE)
    if not folder.is_dir():
        folder.mkdir()


def make_private_file(path: Path) -> None:
    """Make an empty file for its owner alone, unless there is one; its folder must be there."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        return
    os.fchmod(handle, FILE_MODE)
    os.close(handle)


def is_private(path: Path) -> bool:
    """Say whether nobody but its owner may read, write or enter a file or folder."""
    return not stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)


def tighten(path: Path) -> None:
    """Take a file or folder away from everybody but its owner."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IRWXG | stat.S_IRWXO))
