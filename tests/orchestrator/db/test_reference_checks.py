"""Rows that refer to tasks and jobs: foreign keys on SQLite, triggers that look at whole statements on Postgres."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.reference_checks import REFERENCES, Reference
from orchestrator.errors import DatabaseError

Driver = Any  # the fixture's class lives in conftest.py

_INSERTS = {
    "task_inputs": "INSERT INTO task_inputs (task_seq, source_seq) VALUES (:task_seq, :source_seq)",
    "job_tasks": "INSERT INTO job_tasks (job_id, task_id, cached) VALUES (:job_id, :task_id, false)",
    "events": "INSERT INTO events (job_id, task_id, at, event, data) VALUES (:job_id, :task_id, 1, 'test', '{}')",
}


@pytest.fixture
def rows(queue: Driver) -> dict[str, Any]:
    """Two tasks that do not refer to each other, and a job; values for `_INSERTS`."""
    first, second, last = queue.node("first"), queue.node("second"), queue.node("last")
    job = queue.submit([first, last])
    queue.submit([second])
    seqs = {row["id"]: row["seq"] for row in queue.rows("SELECT id, seq FROM tasks")}
    return {"task_id": second.id, "task_seq": seqs[second.id], "source_seq": seqs[first.id], "job_id": job}


def wrong(column: str) -> Any:
    """Return what no row has for its id, or its number."""
    return -1 if column.endswith("seq") else "0" * 12


@pytest.mark.parametrize(("table", "column"), [(each.table, each.column) for each in REFERENCES])
def test_a_reference_to_what_is_not_there_is_refused(
    queue: Driver, rows: dict[str, Any], table: str, column: str
) -> None:
    before = queue.snapshot()
    with pytest.raises(DatabaseError):
        queue.execute(_INSERTS[table], **rows | {column: wrong(column)})
    assert queue.snapshot() == before
    queue.execute(_INSERTS[table], **rows)


@pytest.mark.parametrize(("table", "column"), [(each.table, each.column) for each in REFERENCES])
def test_a_reference_cannot_be_bent(queue: Driver, rows: dict[str, Any], table: str, column: str) -> None:
    queue.execute(_INSERTS[table], **rows)
    with pytest.raises(DatabaseError):
        queue.execute(
            f"UPDATE {table} SET {column} = :wrong WHERE {column} = :id", wrong=wrong(column), id=rows[column]
        )


@pytest.mark.parametrize("change", ["DELETE FROM {0} WHERE {1} = :id", "UPDATE {0} SET {1} = :wrong WHERE {1} = :id"])
@pytest.mark.parametrize("reference", REFERENCES, ids=lambda each: f"{each.table}.{each.column}")
def test_what_is_referred_to_stays(queue: Driver, rows: dict[str, Any], reference: Reference, change: str) -> None:
    table, column, target, key = reference
    values = {"id": rows[column]} | ({"wrong": wrong(key)} if ":wrong" in change else {})
    queue.execute("DELETE FROM job_tasks")
    queue.execute("DELETE FROM events")
    queue.execute("UPDATE jobs SET target_task = NULL")
    queue.execute(_INSERTS[table], **rows)
    with pytest.raises(DatabaseError):
        queue.execute(change.format(target, key), **values)
    queue.execute(f"DELETE FROM {table}")
    queue.execute(f"DELETE FROM {target} WHERE {key} = :id", id=rows[column])


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_a_task_that_another_transaction_begins_to_refer_to_is_not_removed(queue: Driver, rows: dict[str, Any]) -> None:
    queue.execute("DELETE FROM job_tasks")
    queue.execute("DELETE FROM events")
    queue.execute("UPDATE jobs SET target_task = NULL")
    with ThreadPoolExecutor(1) as pool:
        with queue.database.session() as session:
            session.execute(text(_INSERTS["task_inputs"]), rows)
            removal = pool.submit(queue.execute, "DELETE FROM tasks WHERE seq = :seq", seq=rows["source_seq"])
            while not removal.done() and not queue.rows(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            ):
                pass
        with pytest.raises(DatabaseError, match="fk_task_inputs_source_seq"):
            removal.result(30)
    assert queue.rows("SELECT source_seq FROM task_inputs") == [{"source_seq": rows["source_seq"]}]
