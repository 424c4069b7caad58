"""How far long tasks are: what they note in the store, as the orchestrator tells it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.db.rows import TaskRow
from orchestrator.graph import Resources
from orchestrator.scheduling.running import REPORTING, running_tasks, step_text
from orchestrator.states import TaskState
from workers.execution.notes import PROGRESS, TaskNotes
from workers.storage.store import Store, open_store

ROW = TaskRow(
    id="1" * 64,
    key="a" * 64,
    kind="distill",
    version=1,
    label="1200 iterations",
    state=TaskState.RUNNING,
    attempt=1,
    faults_task=0,
    faults_infrastructure=0,
    priority=0,
    resources=Resources(),
    work=1.0,
    seconds=None,
    error=None,
    outputs=None,
    metrics=None,
    not_before=0.0,
    started_at=0.0,
    finished_at=None,
    cached=False,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def test_only_distillation_reports() -> None:
    assert REPORTING == ("distill",)


def test_a_running_task_tells_how_far_it_is(store: Store) -> None:
    store.put_note(PROGRESS, "a" * 64, b'{"done": 500, "total": 1200, "first": 300, "seconds": 100.0}')
    (found,) = running_tasks([ROW], store)
    assert found.document() == {
        "kind": "distill",
        "label": "1200 iterations",
        "done": 500,
        "total": 1200,
        "seconds_left": 350.0,
    }
    assert step_text(found.document()) == "distill at step 500/1200, about 5 min 50 s left"


def test_before_the_first_step_nothing_is_promised(store: Store) -> None:
    TaskNotes(store, "a" * 64).report(0, 1200)
    (found,) = running_tasks([ROW], store)
    assert step_text(found.document()) == "distill at step 0/1200"


@pytest.mark.parametrize(
    "row",
    [replace(ROW, state=TaskState.SUCCEEDED), replace(ROW, kind="round"), replace(ROW, key="b" * 64)],
    ids=["ended", "other kind", "silent"],
)
def test_others_are_left_out(row: TaskRow, store: Store) -> None:
    TaskNotes(store, "a" * 64).report(10, 1200)
    assert running_tasks([row], store) == ()
