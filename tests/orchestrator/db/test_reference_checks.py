"""Rows that refer to tasks and jobs: foreign keys on SQLite, triggers that look at whole statements on Postgres."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.reference_checks import REFERENCES
from orchestrator.errors import DatabaseError

Driver = Any  # the fixture's class lives in conftest.py

_INSERTS = {
    "task_inputs": "INSERT INTO task_inputs (task_id, source_id) VALUES (:task_id, :source_id)",
    "job_tasks": "INSERT INTO job_tasks (job_id, task_id, cached) VALUES (:job_id, :task_id, false)",
    "events": "INSERT INTO events (job_id, task_id, at, event, data) VALUES (:job_id, :task_id, 1, 'test', '{}')",
}


@pytest.fixture
def rows(queue: Driver) -> dict[str, Any]:
    """Two tasks that do not refer to each other, and a job; values for `_INSERTS`."""
    first, second, last = queue.node("first"), queue.node("second"), queue.node("last")
    job = queue.submit([first, last])
    queue.submit([second])
    return {"task_id": second.id, "source_id": first.id, "job_id": job}


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, column, _ in REFERENCES])
def test_a_reference_to_what_is_not_there_is_refused(
    queue: Driver, rows: dict[str, Any], table: str, column: str
) -> None:
    before = queue.snapshot()
    with pytest.raises(DatabaseError):
        queue.execute(_INSERTS[table], **rows | {column: "0" * 12})
    assert queue.snapshot() == before
    queue.execute(_INSERTS[table], **rows)


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, column, _ in REFERENCES])
def test_a_reference_cannot_be_bent(queue: Driver, rows: dict[str, Any], table: str, column: str) -> None:
    queue.execute(_INSERTS[table], **rows)
    with pytest.raises(DatabaseError):
        queue.execute(f"UPDATE {table} SET {column} = :wrong WHERE {column} = :id", wrong="0" * 12, id=rows[column])


@pytest.mark.parametrize("change", ["DELETE FROM {0} WHERE id = :id", "UPDATE {0} SET id = 'other' WHERE id = :id"])
@pytest.mark.parametrize(("table", "column", "target"), REFERENCES)
def test_what_is_referred_to_stays(
    queue: Driver, rows: dict[str, Any], table: str, column: str, target: str, change: str
) -> None:
    queue.execute("DELETE FROM job_tasks")
    queue.execute("DELETE FROM events")
    queue.execute("UPDATE jobs SET target_task = NULL")
    queue.execute(_INSERTS[table], **rows)
    with pytest.raises(DatabaseError):
        queue.execute(change.format(target), id=rows[column])
    queue.execute(f"DELETE FROM {table}")
    queue.execute(f"DELETE FROM {target} WHERE id = :id", id=rows[column])


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_task_that_another_transaction_begins_to_refer_to_is_not_removed(queue: Driver, rows: dict[str, Any]) -> None:
    queue.execute("DELETE FROM job_tasks")
    queue.execute("DELETE FROM events")
    queue.execute("UPDATE jobs SET target_task = NULL")
    with ThreadPoolExecutor(1) as pool:
        with queue.database.session() as session:
            session.execute(text(_INSERTS["task_inputs"]), rows)
            removal = pool.submit(queue.execute, "DELETE FROM tasks WHERE id = :id", id=rows["source_id"])
            while not removal.done() and not queue.rows(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            ):
                pass
        with pytest.raises(DatabaseError, match="refers to"):
            removal.result(30)
    assert queue.rows("SELECT source_id FROM task_inputs") == [{"source_id": rows["source_id"]}]
