"""How soon the queue answers: the benchmark itself, small."""

from __future__ import annotations

import pytest

from benchmarks.scheduler_latency import claims
from orchestrator.db.session import Database


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_claims_find_what_fits_behind_what_does_not(database: Database) -> None:
    found = claims(database.url, finished=300, in_front=40, count=10)
    assert 0 < found["p50"] <= found["p99"]
    with database.session(read_only=True) as session:
        rows = session.connection().exec_driver_sql("SELECT id FROM tasks WHERE state = 'running'").all()
    assert len(rows) == 20
    assert not any(row.id.startswith(("old", "big")) for row in rows)
