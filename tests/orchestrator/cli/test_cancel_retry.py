"""Cancelling a job whose tasks run elsewhere, and retrying it before they can have stopped."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.queue import claim_tasks
from orchestrator.db.session import open_database

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
