"""Queues that break a rule are found out by random faults within a few seeds: the harness bites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from orchestrator.db import job_ends, promote, queue
from orchestrator.db.models import Task
from orchestrator.db.rows import Lease
from tests.faults.broken import though_recorded, whatever_the_time
from tests.faults.databases import Databases
from tests.faults.level1 import run
from tests.faults.schedule import draw

pytestmark = pytest.mark.slow

#: So many seeds at most until a fault is found.
SEEDS = 40
Patch = Callable[[pytest.MonkeyPatch], None]


def leases_never_run_out(patch: pytest.MonkeyPatch) -> None:
    """Take the results of leases that ran out, whoever has the task now."""
    patch.setattr(queue, "_FINISH", whatever_the_time(queue._FINISH))


def cancelled_tasks_go_on(patch: pytest.MonkeyPatch) -> None:
    """Leave the tasks of a job that has ended as they are."""
    patch.setattr(job_ends, "_drop_tasks", lambda session, jobs: None)


def nothing_is_reaped(patch: pytest.MonkeyPatch) -> None:
    """Leave tasks with whoever died with them."""
    patch.setattr("orchestrator.scheduling.leases.reap_expired", lambda session: [])


def renewals_revive(patch: pytest.MonkeyPatch) -> None:
    """Say that every lease is good, and give the task back to who held it, whoever has it now."""

    def renew(session: Session, leases: Sequence[Lease], seconds: float, *, late: bool = False) -> list[Lease]:
        for lease in leases:
            running = update(Task).where(Task.id == lease.task_id, Task.state == "running")
            mine = {"attempt": lease.attempt, "lease_token": lease.token}
            session.execute(running.values(**mine, lease_until=Task.lease_until + seconds))
        return list(leases)

    patch.setattr("orchestrator.scheduling.leases.renew_leases", renew)


def results_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Never see that a key's result is recorded."""
    patch.setattr(promote, "_PROMOTE", though_recorded(promote._PROMOTE))
    patch.setattr(promote, "mark_twins_cached", lambda session, keys: [])


BROKEN: tuple[Patch, ...] = (
    leases_never_run_out,
    cancelled_tasks_go_on,
    nothing_is_reaped,
    renewals_revive,
    results_are_forgotten,
)


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda each: each.__name__)
def test_queue_that_breaks_a_rule_is_found_out(
    break_it: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.faults.service.Service.silence_seconds", 3.0)
    databases = Databases(tmp_path, None)
    break_it(monkeypatch)
    for seed in range(1, SEEDS + 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with databases.one() as url:
            if run(draw(seed, postgres=False), url, folder).violations:
                return
    pytest.fail(f"{break_it.__name__}: got no violation in {SEEDS} seeds, wanted one")
