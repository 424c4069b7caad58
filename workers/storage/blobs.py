"""What every store shares: digests, keys, hashing, and writing a file that is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quant_spec.errors import InvalidInputError
from workers.errors import DigestMismatchError, DiskFullError, StoreError

#: A store's own file about itself, at its root: which database it belongs to.
LABEL_NAME = "quantmill.json"
#: Bytes read at once when a file is hashed or copied.
CHUNK = 1 << 20

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_WORD = re.compile(r"[a-z]+\Z")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_digest(digest: str) -> str:
    """Return the digest if it is 64 lower-case hexadecimal digits.

    Raises
    ------
    StoreError
        If it is not; so nothing else ever becomes part of a path or key.
    """
    if not _DIGEST.match(digest):
        raise StoreError(f"digest: got {digest[:80]!r}, wanted 64 lower-case hexadecimal digits")
    return digest


def is_digest(name: str) -> bool:
    """Say whether this is a blob's name: what else lies in a store is not ours."""
    return _DIGEST.match(name) is not None


def blob_key(digest: str) -> str:
    """Return a blob's place in a store: "sha256/ab/abcdef…"."""
    return f"sha256/{check_digest(digest)[:2]}/{digest}"


def note_key(what: str, key: str) -> str:
    """Return a note's place in a store: "notes/progress/abcdef…"."""
    if not _WORD.match(what):
        raise StoreError(f"note: got {what[:80]!r}, wanted a word of a-z")
    return f"notes/{what}/{check_digest(key)}"


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_bytes(digest: str, got: str, where: str) -> None:
    """Raise DigestMismatchError if the digest that was read is not the one asked for."""
    if got != digest:
        raise DigestMismatchError(f"{where}: got bytes with sha256 {got}, wanted {digest}", digest)


def disk_error(error: OSError, where: Path | str) -> StoreError:
    """Return our error for an OSError that came up while a file was written."""
    if error.errno in NO_ROOM:
        return DiskFullError(f"disk full: got no room left to write {where}, wanted more free space there")
    return StoreError(f"{where}: got {error.strerror or error}, wanted a place to write")


def check_place(place: Path, what: str) -> None:
    """Refuse a file or folder of the user's choice that cannot be made: before the work whose result it is for.

    Raises
    ------
    DiskFullError
        If there is no room.
    InvalidInputError
        If nothing of that name can be made there; `what` names it at the beginning.
    """
    if not place.parent.is_dir():
        raise InvalidInputError(f"{what}: got {place}, but there is no {place.parent}; wanted a place to write")
    try:
        Path(tempfile.mkdtemp(prefix=f".{place.name}-partial-", dir=place.parent)).rmdir()
    except OSError as error:
        if error.errno in NO_ROOM:
            raise disk_error(error, place) from error
        raise InvalidInputError(f"{what}: got {place} ({error.strerror}), wanted a place to write") from error


@contextmanager
def writing(path: Path, *, temporary: Path | None = None, mode: int = 0o444) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends well and is removed when it does not.

    Parameters
    ----------
    path
        The file to make; its folder must exist. Whatever was there is replaced, in one step.
    temporary
        The folder for the temporary file, on the same file system; that of `path` by default.
    mode
        Permissions of the file.

    Raises
    ------
    DiskFullError, StoreError
        If the file cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=".partial-", dir=temporary or path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    is_there = False
    try:
        with open(name, "wb", opener=lambda *_: handle) as file:  # by name, so that `file.name` is a path
            yield file
        os.chmod(name, mode)
        os.replace(name, path)
        is_there = True
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if not is_there:
            Path(name).unlink(missing_ok=True)
