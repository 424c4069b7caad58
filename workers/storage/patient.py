"""A store for a task in flight: what it has computed for an hour is not thrown away for an outage of a minute.

A call that finds the store out is made again until the store is back, for as long as the task has run before, but not
for ever: a task that has only begun gives up at once, so that others are not claimed while the store is out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from workers.errors import StoreUnavailableError
from workers.storage.store import NodeStore

T = TypeVar("T")

#: The longest that a task waits for its store, and between two tries, in seconds.
LONGEST_SECONDS, PAUSE_SECONDS = 3600.0, 5.0


class PatientStore:
    """A store whose blobs are waited for; notes are not, as nobody needs them."""

    def __init__(self, store: NodeStore) -> None:
        """Stand before `store` for a task that begins now."""
        self._store = store
        self._began = time.monotonic()
        self.url = store.url

    def _patiently(self, work: Callable[[], T]) -> T:
        """Make a call again while the store is out."""
        now = time.monotonic()
        ends = now + min(now - self._began, LONGEST_SECONDS)
        while True:
            try:
                return work()
            except StoreUnavailableError:
                if time.monotonic() + PAUSE_SECONDS > ends:
                    raise
            time.sleep(PAUSE_SECONDS)

    def put_bytes(self, data: bytes) -> str:
        """Store bytes."""
        return self._patiently(lambda: self._store.put_bytes(data))

    def put_file(self, path: Path) -> str:
        """Store a file."""
        return self._patiently(lambda: self._store.put_file(path))

    def get_bytes(self, digest: str) -> bytes:
        """Return a blob."""
        return self._patiently(lambda: self._store.get_bytes(digest))

    def get_file(self, digest: str, path: Path) -> None:
        """Write a blob to a file."""
        self._patiently(lambda: self._store.get_file(digest, path))

    def local_path(self, digest: str) -> Path:
        """Return a local file with these bytes."""
        return self._patiently(lambda: self._store.local_path(digest))

    def exists(self, digest: str) -> bool:
        """Say whether there is such a blob."""
        return self._patiently(lambda: self._store.exists(digest))

    def size(self, digest: str) -> int:
        """Return a blob's size in bytes."""
        return self._patiently(lambda: self._store.size(digest))

    def delete(self, digest: str) -> None:
        """Remove a blob."""
        self._store.delete(digest)

    def list(self) -> Iterator[tuple[str, int, float]]:
        """Yield every blob."""
        return self._store.list()

    def put_note(self, what: str, key: str, data: bytes) -> None:
        """Write a note."""
        self._store.put_note(what, key, data)

    def get_note(self, what: str, key: str) -> bytes | None:
        """Read a note."""
        return self._store.get_note(what, key)

    def delete_note(self, what: str, key: str) -> None:
        """Remove a note."""
        self._store.delete_note(what, key)

    def verify(self, digest: str) -> int:
        """Read a blob and compare it with its digest."""
        return self._patiently(lambda: self._store.verify(digest))

    def read_label(self) -> bytes | None:
        """Return the store's label."""
        return self._store.read_label()

    def write_label(self, data: bytes) -> None:
        """Write the store's label."""
        self._store.write_label(data)

    def now(self) -> float:
        """Return the store's time."""
        return self._store.now()

    def sweep(self, older_than_seconds: float) -> int:
        """Remove what dead writers left."""
        return self._store.sweep(older_than_seconds)

    def release(self) -> None:
        """Give up the files that `local_path` returned."""
        self._store.release()
