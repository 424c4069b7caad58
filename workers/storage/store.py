"""The object store: immutable blobs under the SHA-256 of their bytes, at `sha256/ab/abcdef…`.

`open_store` picks a backend by URL: a folder (`/path`, `file:///path`) or S3 (`s3://bucket/prefix`). `open_cached` adds
what a worker needs: a local, read-only file for every blob.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from workers.errors import StoreUnreachableError
from workers.urls import shown_url

#: How the URLs of the two kinds of store begin; a folder may also be given by its path.
S3 = "s3://"
_FILE = "file://"
#: Size limit of a node's cache, unless another is given: 20 GiB.
CACHE_LIMIT_BYTES = 20 << 30


class Store(Protocol):
    """Blobs by digest (64 hexadecimal digits). Every write is atomic; every read is verified.

    Every call raises StoreUnavailableError while the store does not serve: no answer, no right, no room.

    A put of bytes that are there already makes them young again, so a collection of old garbage with a grace period
    above two hours never takes what a task in flight relies on. It also looks at what is there, and replaces it if it
    is not what is put: a folder reads the blob once, S3 is asked for the checksum that it keeps, and where it keeps
    none (a service without checksums, a blob that came in parts) the bytes are sent again. So a put of what is there
    costs at most what the first one did.

    Files in the store that are no blobs are passed over.
    """

    url: str

    def put_bytes(self, data: bytes) -> str:
        """Store bytes unless they are there, and return their digest."""
        ...

    def put_file(self, path: Path) -> str:
        """Store a file's bytes unless they are there, without reading them all into memory, and return their digest."""
        ...

    def get_bytes(self, digest: str) -> bytes:
        """Return a blob; raises NotFoundError or DigestMismatchError."""
        ...

    def get_file(self, digest: str, path: Path) -> None:
        """Write a blob to a file, whole or not at all; raises NotFoundError or DigestMismatchError."""
        ...

    def verify(self, digest: str) -> int:
        """Read a whole blob, keeping nothing; return its bytes. Raises NotFoundError or DigestMismatchError."""
        ...

    def exists(self, digest: str) -> bool:
        """Say whether there is such a blob."""
        ...

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes; raises NotFoundError."""
        ...

    def delete(self, digest: str) -> None:
        """Remove a blob, if it is there."""
        ...

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield every blob's digest, bytes, and time of its last put in seconds since 1970."""
        ...

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Store bytes by name, in place of those that were there: notes of a running task."""
        ...

    def get_note(self, what: str, key: str) -> bytes | None:
        """Return the bytes that were last stored by this name; None if there are none."""
        ...

    def delete_note(self, what: str, key: str) -> None:
        """Remove what is stored by this name, if it is there."""
        ...

    def read_label(self) -> bytes | None:
        """Return what the store says of itself; None if nothing has been written."""
        ...

    def write_label(self, data: bytes) -> None:
        """Let the store say this of itself, in place of what it said."""
        ...

    def now(self) -> float:
        """Return the time of the store's own clock, which `list` uses too, in seconds since 1970."""
        ...

    def sweep(self, older_than_seconds: float) -> int:
        """Remove what writers that died left unfinished, old notes too; return how many such leftovers there were."""
        ...


class NodeStore(Store, Protocol):
    """A store as a worker sees it."""

    def local_path(self, digest: str) -> Path:
        """Return a local file with these bytes, verified; it may only be read, and is there until `release`."""
        ...

    def release(self) -> None:
        """Give up the files that `local_path` returned; called when a task ends."""
        ...


def open_store(url: str, *, quick: bool = False) -> Store:
    """Open a store.

    Parameters
    ----------
    url
        A folder's path, `file:///folder`, or `s3://bucket/prefix` (endpoint, region and credentials from the usual AWS
        variables and files).
    quick
        Give up soon: what fails is asked for once and for a few seconds, to see whether the store is there at all.

    Raises
    ------
    StoreUnreachableError
        If there is no such store, it does not answer, or it does not let us in.
    """
    if url.startswith(S3):
        from workers.storage.store_s3 import S3Store  # boto3 takes long to import

        return S3Store(url, quick=quick)
    return _open_folder(url)


def open_cached(url: str, cache_dir: Path, limit_bytes: int = CACHE_LIMIT_BYTES) -> NodeStore:
    """Open a store with local files for its blobs: a folder's own, or those of a read-through cache.

    Parameters
    ----------
    url
        As for `open_store`.
    cache_dir
        The node's cache; any number of processes may share it.
    limit_bytes
        The cache is cut back to this size, least recently used first; files in use are spared.
    """
    if url.startswith(S3):
        from workers.storage.cache import CachedStore

        return CachedStore(open_store(url), cache_dir, limit_bytes)
    return _open_folder(url)


def _open_folder(url: str) -> NodeStore:
    """Open a folder store by path or file URL."""
    from workers.storage.store_folder import FolderStore

    # A path is taken as it is: `%`, `#` and `?` mean something in URLs only.
    if "://" not in url and url:
        return FolderStore(Path(url).expanduser())
    host, slash, path = url.removeprefix(_FILE).partition("/")
    if not url.startswith(_FILE) or host not in ("", "localhost") or set("?#") & set(path):
        wanted = "a folder, file:///folder (with ? and # as %3F and %23) or s3://bucket/prefix"
        raise StoreUnreachableError(f"store: got {shown_url(url)!r}, wanted {wanted}")
    return FolderStore(Path(unquote(slash + path)))
