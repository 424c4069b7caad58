"""Cancelling a job whose tasks run elsewhere, and retrying it before they can have stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.queue import claim_tasks
from orchestrator.db.session import open_database
from orchestrator.scheduling.scheduler import SchedulerConfig
from tests.orchestrator.in_process import InProcess
from workers.errors import Fault
from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity, Finished

SET = ("--set", "sampler.num_inference_steps=2", "--set", "calibration.seeds=2", "--set", "evaluation.seeds=2")
LEASE_SECONDS = 4.0


@pytest.mark.usefixtures("without_ray")
def test_a_job_that_is_cancelled_and_retried_runs_no_task_twice_at_once(
    cli: Callable[..., Any], with_digits: Path
) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--json").json["job"]
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    with database.session() as session:
        (taken,) = claim_tasks(session, owner="another machine", limit=1, lease_seconds=LEASE_SECONDS)
        lease = session.execute(
            text("SELECT lease_until FROM tasks WHERE id = :id"), {"id": taken.lease.task_id}
        ).scalar_one()
    database.close()
    for _ in range(2):
        assert cli("jobs", "cancel", job).code == 0
        assert cli("jobs", "retry", job).code == 0
    assert cli("serve", "--drain").code == 0
    assert cli("jobs", "show", job, "--json").json["state"] == "succeeded"
    events = cli("jobs", "logs", job, "--json").json
    claimed = [event["at"] for event in events if event["event"] == "claimed" and event["task"] == taken.lease.task_id]
    assert len(claimed) == 2
    assert datetime.fromisoformat(claimed[1]).timestamp() >= lease - 1, "times are shown in whole seconds"


class Stuck(InProcess):
    """Runs each call but the first, which goes on until it is cancelled; `meanwhile` is done while it runs."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self.meanwhile: Callable[[], None] | None = meanwhile
        self.stuck: int | None = None
        self.begun = time.monotonic()

    def capacity(self) -> Capacity:
        """Return what there is, unless all wait for too long."""
        assert time.monotonic() < self.begun + 120.0, "the task waited for its lease"
        return super().capacity()

    def submit(self, call: TaskCall) -> int:
        """Run a call, or begin with the first."""
        if self.stuck is not None:
            return super().submit(call)
        self.stuck = next(self._handles)
        return self.stuck

    def wait(self, timeout: float) -> list[Finished]:
        """Return what ended."""
        if self.meanwhile is not None:
            self.meanwhile()
            self.meanwhile = None
        return super().wait(timeout)

    def cancel(self, handle: int) -> None:
        """Stop the first call, and say so."""
        if handle == self.stuck:
            self._finished.append(Finished(handle, None, Fault.INFRASTRUCTURE, "cancelled"))


@pytest.fixture
def long_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that outlast every test, renewed twice a second."""
    monkeypatch.setattr(
        "orchestrator.actions.execution.SchedulerConfig", partial(SchedulerConfig, lease_seconds=6000.0)
    )
    monkeypatch.setattr("orchestrator.scheduling.leases.RENEWALS", 12000)


_KILLED = """
from functools import partial
import signal, os
import orchestrator.actions.execution as execution
from orchestrator.cli.main import run_cli
from orchestrator.scheduling.scheduler import SchedulerConfig
from tests.orchestrator.cli.test_cancel_retry import Stuck
from orchestrator.db.session import open_database
from orchestrator.db.orchestrators import list_orchestrators
import sys, time

def die():
    database = open_database(f"sqlite:///{sys.argv[1]}/quantmill.db")
    while True:
        with database.session(read_only=True) as session:
            if list_orchestrators(session):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)

execution.SchedulerConfig = partial(SchedulerConfig, lease_seconds=6000.0)
execution.RayExecutor.start = lambda *_, **__: Stuck(die)
run_cli(["--home", sys.argv[1], "serve"])
"""


def test_nobody_waits_for_an_orchestrator_of_this_machine_that_was_killed(
    cli: Callable[..., Any], with_digits: Path
) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--json").json["job"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, with_digits], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert cli("jobs", "show", job, "--json").json["tasks"]["running"] > 0
    assert cli("jobs", "cancel", job).code == 0
    assert cli("jobs", "retry", job).code == 0
    assert not some_wait(with_digits)


def some_wait(home: Path) -> bool:
    """Say whether any task waits for a moment to come."""
    database = open_database(f"sqlite:///{home / 'quantmill.db'}")
    with database.session(read_only=True) as session:
        latest = session.execute(text("SELECT max(not_before) FROM tasks")).scalar_one()
    database.close()
    return bool(latest > time.time())


def twice(cli: Callable[..., Any], job: str) -> None:
    """Check that a job succeeded, some of whose tasks were begun twice."""
    assert cli("jobs", "show", job, "--json").json["state"] == "succeeded"
    events = cli("jobs", "logs", job, "--json").json
    claimed = Counter(event["task"] for event in events if event["event"] == "claimed")
    assert max(claimed.values()) == 2


@pytest.mark.usefixtures("long_leases")
def test_who_retries_a_job_does_not_wait_for_a_run_that_has_ended(
    cli: Callable[..., Any], with_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel() -> None:
        (job,) = cli("jobs", "ls", "--json").json
        assert cli("jobs", "cancel", job["job"]).code == 0

    executor = Stuck(cancel)
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: executor)
    assert cli("run", "minmax-w8a8", "--model", "digits", *SET).code == 103
    (job,) = cli("jobs", "ls", "--json").json
    assert cli("jobs", "retry", job["job"]).code == 0
    assert not some_wait(with_digits)


@pytest.mark.usefixtures("with_digits", "long_leases")
def test_a_job_that_is_retried_waits_no_longer_than_its_cancelled_task_runs(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--json").json["job"]

    def again() -> None:
        assert cli("jobs", "cancel", job).code == 0
        assert cli("jobs", "retry", job).code == 0

    executor = Stuck(again)
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: executor)
    assert cli("serve", "--drain").code == 0
    twice(cli, job)
