from __future__ import annotations

import os

import pytest

from workers.execution.notes import CHECKPOINT, PROGRESS, TaskNotes, read_progress
from workers.storage.store import NodeStore

KEY = "a" * 64


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.execution.notes.CHECKPOINT_SECONDS", (0.0, 0.0))


def test_old_notes_are_swept(folder_store: NodeStore) -> None:
    for what in ("progress", "checkpoint"):
        folder_store.put_note(what, KEY, b"{}")
    (old,) = [path for path in _files(folder_store) if "checkpoint" in path]
    os.utime(old, (0, 0))
    assert folder_store.sweep(3600) == 1
    assert folder_store.get_note("progress", KEY) == b"{}"
    assert folder_store.get_note("checkpoint", KEY) is None


def _files(store: NodeStore) -> list[str]:
    return [os.path.join(root, name) for root, _, names in os.walk(store.url) for name in names]


def test_a_checkpoint_comes_back_whole_or_not_at_all(folder_store: NodeStore) -> None:
    notes = TaskNotes(folder_store, KEY)
    assert notes.load_checkpoint() is None
    notes.offer_checkpoint(lambda: b"state of 10 iterations")
    assert TaskNotes(folder_store, KEY).load_checkpoint() == b"state of 10 iterations"
    damaged = folder_store.get_note(CHECKPOINT, KEY)
    assert damaged is not None
    folder_store.put_note(CHECKPOINT, KEY, damaged[:-1])
    assert notes.load_checkpoint() is None


def test_checkpoints_take_a_small_share_of_the_time(folder_store: NodeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [0.0], []
    monkeypatch.setattr("workers.execution.notes.CHECKPOINT_SECONDS", (5.0, 300.0))
    monkeypatch.setattr("workers.execution.notes.monotonic", lambda: now[0])
    notes = TaskNotes(folder_store, KEY)
    takes = {5.0: 0.01, 10.5: 1.0, 61.5: 100.0, 461.5: 1.0}

    def make() -> bytes:
        made.append(now[0])
        now[0] += takes[now[0]]
        return b"state"

    while now[0] < 470:
        notes.offer_checkpoint(make)
        now[0] = (now[0] // 0.5 + 1) * 0.5
    assert made == [5.0, 10.5, 61.5, 461.5]


def test_a_task_that_ended_leaves_nothing(folder_store: NodeStore) -> None:
    notes = TaskNotes(folder_store, KEY)
    notes.offer_checkpoint(lambda: b"data")
    notes.report(1, 2)
    notes.clear()
    assert folder_store.get_note(CHECKPOINT, KEY) is None
    assert folder_store.get_note(PROGRESS, KEY) is None
    assert _files(folder_store) == []


def test_progress_counts_from_where_this_attempt_began(
    folder_store: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 11.0, 30.0])
    monkeypatch.setattr("workers.execution.notes.monotonic", lambda: next(clock))
    notes = TaskNotes(folder_store, KEY)
    notes.report(100, 400)
    notes.report(110, 400)  # a second later: too soon
    told = read_progress(folder_store, KEY)
    assert told is not None
    assert (told.done, told.seconds_left) == (100, None)
    notes.report(200, 400)
    told = read_progress(folder_store, KEY)
    assert told is not None
    assert (told.done, told.total, told.seconds) == (200, 400, 20.0)
    assert told.seconds_left == pytest.approx(40.0)


def test_progress_that_cannot_be_read_is_none(folder_store: NodeStore) -> None:
    assert read_progress(folder_store, KEY) is None
    folder_store.put_note(PROGRESS, KEY, b"not json")
    assert read_progress(folder_store, KEY) is None
