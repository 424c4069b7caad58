"""A node's cache in front of a remote store: read-only files, shared by every process on the node.

* A blob is fetched once, whoever asks; a fetch is atomic; a file that does not have its digest is fetched again.
* Over the size limit, files go least recently used first. A file in use is spared: `local_path` holds a shared lock on
  it until `release`, and the operating system drops the lock if the process dies.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from workers.errors import StoreError
from workers.storage.blobs import blob_key, check_digest, digest_of_file, disk_error, writing
from workers.storage.locks import hold
from workers.storage.private import make_private
from workers.storage.store import Store


class CachedStore:
    """A store whose reads go through local files; writes go to the store and stay in the cache as well."""

    def __init__(self, store: Store, folder: Path, limit_bytes: int) -> None:
        """Put a cache of at most `limit_bytes` (but for files in use) in `folder` in front of `store`."""
        self.url = store.url
        self._store = store
        self._folder = folder.absolute()
        self._limit = limit_bytes
        self._held: dict[str, int] = {}
        # Inode, size and time of the files that this process has verified.
        self._verified: dict[str, tuple[int, int, int]] = {}
        try:
            make_private(self._folder / "locks")
        except OSError as error:
            raise StoreError(f"cache: got {error.strerror} for {folder}, wanted a folder to write to") from error

    def local_path(self, digest: str) -> Path:
        """Return a local file with these bytes, verified and safe from eviction until `release`."""
        fetched = False
        with self._locked(check_digest(digest)) as path:
            if digest not in self._held:
                handle = self._open(digest, path)
                if handle is None:
                    self._store.get_file(digest, path)
                    fetched, handle = True, self._open(digest, path)
                if handle is None:
                    raise StoreError(f"{path}: got nothing there after it was fetched, wanted the cache left alone")
                self._held[digest] = handle
        if fetched:
            self._evict()
        return path

    def release(self) -> None:
        """Give up the files that `local_path` returned."""
        while self._held:
            os.close(self._held.popitem()[1])

    def get_bytes(self, digest: str) -> bytes:
        """Return a blob."""
        return self.local_path(digest).read_bytes()

    def get_file(self, digest: str, path: Path) -> None:
        """Write a blob to a file."""
        source = self.local_path(digest)
        with writing(path) as file, source.open("rb") as cached:
            shutil.copyfileobj(cached, file)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes; the next task on this node that reads them finds them in the cache."""
        digest = self._store.put_bytes(data)
        with self._locked(digest) as path:
            if not path.exists():
                with writing(path) as file:
                    file.write(data)
        self._evict()
        return digest

    def put_file(self, path: Path) -> str:
        """Store a file; the next task on this node that reads it finds it in the cache."""
        digest = self._store.put_file(path)
        with self._locked(digest) as cached:
            if not cached.exists():
                with writing(cached) as file, path.open("rb") as source:
                    shutil.copyfileobj(source, file)
        self._evict()
        return digest

    def verify(self, digest: str) -> int:
        """Read a whole blob in the store itself, not in the cache."""
        return self._store.verify(digest)

    def exists(self, digest: str) -> bool:
        """Say whether the store has such a blob."""
        return self._store.exists(digest)

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes."""
        return self._store.size(digest)

    def delete(self, digest: str) -> None:
        """Remove a blob from the store and from this node."""
        self._store.delete(digest)
        (self._folder / blob_key(digest)).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield the store's blobs."""
        return self._store.list()

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Write a note to the store."""
        self._store.put_note(what, key, data)

    def get_note(self, what: str, key: str) -> bytes | None:
        """Read a note from the store."""
        return self._store.get_note(what, key)

    def delete_note(self, what: str, key: str) -> None:
        """Remove a note from the store."""
        self._store.delete_note(what, key)

    def read_label(self) -> bytes | None:
        """Read the store's label."""
        return self._store.read_label()

    def write_label(self, data: bytes) -> None:
        """Write the store's label."""
        self._store.write_label(data)

    def now(self) -> float:
        """Return the time of the store's clock."""
        return self._store.now()

    def sweep(self, older_than_seconds: float) -> int:
        """Remove what dead writers left unfinished in the store and in the cache."""
        limit = time.time() - older_than_seconds
        old = [path for path in self._folder.glob("sha256/??/.partial-*") if path.stat().st_mtime < limit]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old) + self._store.sweep(older_than_seconds)

    @contextmanager
    def _locked(self, digest: str, *, wait: bool = True) -> Iterator[Path]:
        """Hold one of 256 locks, so that no two processes fetch or evict the same blob at once."""
        path = self._folder / blob_key(digest)
        with FileLock(self._folder / "locks" / digest[:2], timeout=-1 if wait else 0):
            try:
                make_private(path.parent)
            except OSError as error:
                raise disk_error(error, path) from error
            yield path

    def _open(self, digest: str, path: Path) -> int | None:
        """Hold a cached file; None if it is not there, or was not what its digest says and was removed."""
        handle = hold(path)
        if handle is None:
            return None
        status = os.fstat(handle)
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified.get(digest) != state:
            if digest_of_file(path) != digest:
                path.unlink(missing_ok=True)
                os.close(handle)
                return None
            self._verified[digest] = state
        # The time of last use; set by hand, as most file systems do not keep it.
        os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return handle

    def _evict(self) -> None:
        """Cut the cache back to its limit, least recently used first."""
        files = []
        for path in (self._folder / "sha256").glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_atime_ns, status.st_size, path))
        over = sum(size for _, size, _ in files) - self._limit
        for _, size, path in sorted(files):
            if over <= 0:
                return
            if not path.name.startswith(".") and self._remove(path):
                over -= size

    def _remove(self, path: Path) -> bool:
        """Remove a cached file unless someone is using or fetching it."""
        try:
            with self._locked(path.name, wait=False):
                handle = hold(path, exclusive=True)
                if handle is None:
                    return False
                path.unlink()
                os.close(handle)
                return True
        except Timeout:
            return False
