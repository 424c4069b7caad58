"""How large the store is, by listing it in the background: rarely, as a listing reads every name."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from workers.errors import WorkerError
from workers.storage.store import Store

log = logging.getLogger(__name__)

# Listings come once an hour, and a listing may take a twentieth of the time at most.
_PAUSE_SECONDS = 3600.0
_PAUSES = 20.0


@dataclass(frozen=True, slots=True)
class Listing:
    """What a listing found: how many blobs, how many bytes, and when it ended by `time.monotonic`."""

    blobs: int
    bytes: int
    at: float


class StoreSize:
    """Lists a store again and again, from a thread of its own, until stopped."""

    def __init__(self, store: Store) -> None:
        """List `store`; `start` begins."""
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-size", daemon=True)
        #: The last listing; None before the first has come to its end.
        self.listing: Listing | None = None

    def start(self) -> None:
        """Begin with a listing."""
        self._thread.start()

    def stop(self) -> None:
        """List no more; a listing that runs now is left to itself."""
        self._stop.set()

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            began = time.monotonic()
            try:
                sizes = [0, 0]
                for _, size, _ in self._store.list():
                    sizes = [sizes[0] + 1, sizes[1] + size]
                    if self._stop.is_set():
                        return
            except WorkerError as error:
                log.warning("the store cannot be listed for its size: %s", error)
            else:
                self.listing = Listing(sizes[0], sizes[1], time.monotonic())
            pause = max(_PAUSE_SECONDS, _PAUSES * (time.monotonic() - began))
