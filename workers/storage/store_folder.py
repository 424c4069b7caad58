"""The store as a folder: read-only files, each there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workers.errors import NotFoundError, StoreError, StoreUnreachableError
from workers.storage.blobs import (
    CHUNK,
    LABEL_NAME,
    blob_key,
    check_bytes,
    digest_of,
    digest_of_file,
    is_digest,
    note_key,
    writing,
)

# Partial files lie beside the blobs' folders, so that a rename never crosses a file system.
_PARTIAL = "partial"


class FolderStore:
    """Blobs in a folder; several machines may share it over a network file system.

    Nothing is synchronised to disk at once: a blob that a power cut damaged is detected when it is read.
    """

    def __init__(self, root: Path) -> None:
        """Open the folder, which must exist and be writable; else StoreUnreachableError."""
        self.root = root.absolute()
        self.url = str(self.root)
        if not self.root.is_dir() or not os.access(self.root, os.W_OK | os.X_OK):
            raise StoreUnreachableError(f"store: got {self.url}, which is not a folder to write to, wanted one")
        # Inode, size and time of the files that this process has verified; they are never written to again.
        self._verified: dict[str, tuple[int, int, int]] = {}

    def _path(self, digest: str) -> Path:
        return self.root / blob_key(digest)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; see `workers.storage.store.Store`."""
        digest = digest_of(data)
        if not self._renew(digest, len(data)):
            with writing(self._place(digest), temporary=self._partial()) as file:
                file.write(data)
        return digest

    def put_file(self, path: Path) -> str:
        """Store a file; see `workers.storage.store.Store`."""
        digest = digest_of_file(path)
        if not self._renew(digest, path.stat().st_size):
            with writing(self._place(digest), temporary=self._partial()) as file, path.open("rb") as source:
                shutil.copyfileobj(source, file, CHUNK)
        return digest

    def get_bytes(self, digest: str) -> bytes:
        """Read a blob; see `workers.storage.store.Store`."""
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise _missing(self.url, digest) from None
        check_bytes(digest, digest_of(data), str(self._path(digest)))
        return data

    def get_file(self, digest: str, path: Path) -> None:
        """Copy a blob to a file; see `workers.storage.store.Store`."""
        try:
            source = self._path(digest).open("rb")
        except FileNotFoundError:
            raise _missing(self.url, digest) from None
        with source, writing(path) as file:
            shutil.copyfileobj(source, file, CHUNK)
            file.flush()
            check_bytes(digest, digest_of_file(Path(file.name)), str(self._path(digest)))

    def verify(self, digest: str) -> int:
        """Read a whole blob; see `workers.storage.store.Store`."""
        path = self._path(digest)
        try:
            size = path.stat().st_size
            got = digest_of_file(path)
        except (FileNotFoundError, IsADirectoryError):
            raise _missing(self.url, digest) from None
        check_bytes(digest, got, str(path))
        return size

    def exists(self, digest: str) -> bool:
        """Say whether there is such a blob."""
        return self._path(digest).is_file()

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            raise _missing(self.url, digest) from None

    def delete(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        self._path(digest).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield every blob's digest, bytes, and time of its last put."""
        for folder in sorted((self.root / "sha256").glob("[0-9a-f][0-9a-f]")):
            for entry in sorted(os.scandir(folder), key=lambda item: item.name):
                try:
                    if not (is_digest(entry.name) and entry.is_file(follow_symlinks=False)):
                        continue
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                yield entry.name, status.st_size, status.st_mtime

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Write a note; see `workers.storage.store.Store`."""
        path = self.root / note_key(what, key)
        self._make(path.parent)
        with writing(path, temporary=self._partial()) as file:
            file.write(data)

    def get_note(self, what: str, key: str) -> bytes | None:
        """Read a note; see `workers.storage.store.Store`."""
        try:
            return (self.root / note_key(what, key)).read_bytes()
        except FileNotFoundError:
            return None

    def delete_note(self, what: str, key: str) -> None:
        """Remove a note; see `workers.storage.store.Store`."""
        (self.root / note_key(what, key)).unlink(missing_ok=True)

    def read_label(self) -> bytes | None:
        """Read the label; see `workers.storage.store.Store`."""
        try:
            return (self.root / LABEL_NAME).read_bytes()
        except FileNotFoundError:
            return None

    def write_label(self, data: bytes) -> None:
        """Write the label; see `workers.storage.store.Store`."""
        with writing(self.root / LABEL_NAME, temporary=self._partial(), mode=0o644) as file:
            file.write(data)

    def now(self) -> float:
        """Return the time that the file system gives a new file: on a network, the server's."""
        with tempfile.TemporaryFile(dir=self._partial()) as file:
            file.write(b"now")
            file.flush()
            return os.fstat(file.fileno()).st_mtime

    def sweep(self, older_than_seconds: float) -> int:
        """Remove partial files of writers that died, and notes of tasks that never went on."""
        limit = self.now() - older_than_seconds
        left = [*(self.root / _PARTIAL).glob(".partial-*"), *(self.root / "notes").glob("*/*")]
        old = [path for path in left if path.stat().st_mtime < limit]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)

    def local_path(self, digest: str) -> Path:
        """Return the blob's own file; it is hashed when this process first asks for it."""
        path = self._path(digest)
        try:
            status = path.stat()
        except FileNotFoundError:
            raise _missing(self.url, digest) from None
        # A put of the same bytes renews the time of change, and hashing once more then does no harm.
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get(digest) != state:
            check_bytes(digest, digest_of_file(path), str(path))
            self._verified[digest] = state
        return path

    def release(self) -> None:
        """Nothing to give up: the files are the store's own."""

    def _partial(self) -> Path:
        """Return the folder of partial files."""
        folder = self.root / _PARTIAL
        self._make(folder)
        return folder

    def _place(self, digest: str) -> Path:
        """Return a blob's path; its folder exists."""
        path = self._path(digest)
        self._make(path.parent)
        return path

    def _make(self, folder: Path) -> None:
        """Make a folder of the store, but not the store itself, which may be a mount that is gone."""
        if not self.root.is_dir():
            raise StoreUnreachableError(f"store: got {self.url}, which is gone, wanted a folder to write to")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: got {error.strerror or error}, wanted a folder of the store") from error

    def _renew(self, digest: str, size: int) -> bool:
        """Make a blob young again; say whether it is there, every byte as it must be."""
        path = self._path(digest)
        try:
            # Read anew even if this process has verified it: damage on a disk changes no time of change.
            if path.stat().st_size != size or digest_of_file(path) != digest:
                return False
            os.utime(path)
        except OSError:
            return False
        return True


def _missing(url: str, digest: str) -> NotFoundError:
    """Return the error for a blob that is not there."""
    return NotFoundError(f"{url}: got no blob {digest}, wanted it in the store", digest)
