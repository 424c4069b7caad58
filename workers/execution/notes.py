"""What a task that has not ended leaves in the store, by its key: its last checkpoint, and how far it is.

A task that was killed finds its checkpoint when it is tried again, on whatever node, and goes on from there. Notes are
no results: they may be missing, and who reads them must do without.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from time import monotonic

from quant_spec.documents import read_json
from workers.errors import StoreError, StoreUnavailableError
from workers.storage.store import Store

#: Kinds of notes: the first part of their names.
CHECKPOINT, PROGRESS = "checkpoint", "progress"
#: Progress is written at most this often, in seconds.
PROGRESS_SECONDS = 5.0
#: Seconds between two checkpoints: so many that they take `CHECKPOINT_SHARE` of the time, but within these bounds.
CHECKPOINT_SECONDS = (5.0, 300.0)
CHECKPOINT_SHARE = 0.02
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class TaskProgress:
    """How far a task is: `done` of `total` steps, `seconds` since this attempt began, at `first` steps."""

    done: int
    total: int
    first: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """Seconds that are left at the pace of this attempt; None before its first step."""
        made = self.done - self.first
        return self.seconds / made * (self.total - self.done) if made > 0 else None


class TaskNotes:
    """The notes of one task."""

    def __init__(self, store: Store, key: str) -> None:
        """Keep notes of the task with this key in `store`."""
        self._store, self._key = store, key
        self._started = self._written = monotonic()
        self._checkpoint_due = self._started + CHECKPOINT_SECONDS[0]
        self._first: int | None = None
        self._left_some = False

    def offer_checkpoint(self, make: Callable[[], bytes]) -> None:
        """Store a checkpoint in place of the last one if it is time for one; else cheap, and nothing is made."""
        begun = monotonic()
        if begun < self._checkpoint_due:
            return
        self._left_some = True
        data = make()
        # A store that is out costs a checkpoint, and not what was computed.
        with suppress(StoreUnavailableError):
            self._store.put_note(CHECKPOINT, self._key, hashlib.sha256(data).digest() + data)
        ended = monotonic()
        least, most = CHECKPOINT_SECONDS
        self._checkpoint_due = ended + min(max((ended - begun) / CHECKPOINT_SHARE, least), most)

    def load_checkpoint(self) -> bytes | None:
        """Return the last checkpoint of an earlier attempt; None if there is none, or it is damaged."""
        self._left_some = True
        data = self._store.get_note(CHECKPOINT, self._key)
        if data is None or hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
            return None
        return data[_DIGEST_BYTES:]

    def report(self, done: int, total: int) -> None:
        """Say how far the task is, in steps of whatever it does; cheap, as most calls write nothing."""
        now = monotonic()
        if self._first is None:
            self._first, self._started = done, now
        elif now - self._written < PROGRESS_SECONDS:
            return
        self._written, self._left_some = now, True
        progress = TaskProgress(done, total, self._first, round(now - self._started, 1))
        with suppress(StoreUnavailableError):
            self._store.put_note(PROGRESS, self._key, json.dumps(asdict(progress)).encode())

    def clear(self) -> None:
        """Remove the notes of a task that has ended well."""
        with suppress(StoreUnavailableError):
            for what in (CHECKPOINT, PROGRESS) if self._left_some else ():
                self._store.delete_note(what, self._key)


def read_progress(store: Store, key: str) -> TaskProgress | None:
    """Return how far the task with this key is, if it says so."""
    try:
        data = store.get_note(PROGRESS, key)
        return None if data is None else TaskProgress(**read_json(data, "note"))
    except (StoreError, ValueError, TypeError):
        return None  # a note is never worth a failure
