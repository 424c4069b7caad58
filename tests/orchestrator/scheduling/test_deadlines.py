"""Deadlines of tasks, and that they reach the executor."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from orchestrator.db.queries import find_job
from orchestrator.db.rows import ClaimedTask, Lease, Timing
from orchestrator.db.session import Database
from orchestrator.graph import Resources
from orchestrator.scheduling.deadlines import LEAST_SECONDS, UNKNOWN_SECONDS, deadline_seconds, known_rates
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.states import JobState
from tests.orchestrator.in_process import InProcess
from tests.orchestrator.outages import graph, submit
from workers.execution.execute import TaskCall

TASK = ClaimedTask(Lease("t", 1, "x"), "round", 1, {}, {}, Resources(), work=100.0, label="")


@pytest.mark.parametrize(
    ("task", "timings", "seconds"),
    [
        (TASK, {}, UNKNOWN_SECONDS),
        (TASK, {"round": Timing(10, 10.0, 0.0)}, LEAST_SECONDS),
        # 2000 s for 100 GMAC: half of a second of it fixed, the rest by work.
        (TASK, {"round": Timing(1, 2000.0, 100.0)}, 20_000.0),
        (replace(TASK, work=200.0), {"round": Timing(1, 2000.0, 100.0)}, 39_995.0),
        (replace(TASK, deadline_seconds=60.0), {"round": Timing(1, 2000.0, 100.0)}, 60.0),
    ],
)
def test_deadline_is_ten_times_the_estimate_and_at_least_an_hour_or_what_was_given(
    task: ClaimedTask, timings: dict[str, Timing], seconds: float
) -> None:
    assert deadline_seconds(task, known_rates(timings)) == pytest.approx(seconds)


class Noting(InProcess):
    """Notes the deadlines that calls came with."""

    def __init__(self) -> None:
        super().__init__()
        self.deadlines: list[float | None] = []

    def submit(self, call: TaskCall) -> int:
        """Run a call."""
        self.deadlines.append(call.deadline_seconds)
        return super().submit(call)


def test_a_tasks_own_deadline_reaches_the_executor(database: Database, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    nodes = graph(2, seconds=0.01)
    job = submit(database, nodes)
    with database.session() as session:
        session.execute(text("UPDATE tasks SET deadline_seconds = 90 WHERE id = :id"), {"id": nodes[0].id})
        # What runs longest of all that ever ran: an hour is not enough.
        session.execute(
            text(
                "INSERT INTO kind_timings (kind, version, n, seconds, work, device, peak_rss_bytes, peak_gpu_bytes)"
                " VALUES ('noop', 1, 1, 1000.0, 0, 'cpu', 0, 0)"
            )
        )
    executor = Noting()
    config = SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", poll_seconds=0.1)
    Scheduler(database, lambda: executor, config).run(drain=True, stop=threading.Event())
    assert executor.deadlines == [90.0, 10_000.0]
    with database.session(read_only=True) as session:
        assert find_job(session, job).state is JobState.SUCCEEDED
