"""Locks that the operating system drops when their holder dies: files in use, and folders of one process."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.storage.private import make_private

_NEW_SECONDS = 60.0
# What `own_folder` makes ends so; whatever else begins with the same letters is not ours to remove.
_OWN = ".own"


def hold(path: Path, *, exclusive: bool = False) -> int | None:
    """Lock a file or folder without waiting.

    Returns
    -------
    int or None
        A file descriptor that holds the lock until it is closed; None if someone else holds it, or it is gone.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def own_folder(parent: Path, prefix: str = "task-") -> Iterator[Path]:
    """Make an empty folder that is removed at the end of the block, or by a later call if this process dies in it."""
    make_private(parent)
    _sweep(parent, prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix, suffix=_OWN, dir=parent))
    handle = hold(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders that `own_folder` made for this user and no process holds."""
    for path in parent.glob(f"{prefix}*{_OWN}"):
        with suppress(OSError):
            # A folder is there a moment before it is locked, so one that is new is left alone.
            status = path.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if not is_ours or time.time() - status.st_mtime < _NEW_SECONDS:
                continue
            handle = hold(path, exclusive=True)
            if handle is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)
