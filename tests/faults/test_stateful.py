"""The queue under any sequence of events, watched from outside: what was recorded keeps every rule of the checker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from orchestrator.db.rows import ClaimedTask
from orchestrator.db.session import open_database
from quant_spec.keys import task_key
from tests.faults.checker import violations
from tests.faults.history import History
from tests.faults.recorder import Recorder, install
from tests.orchestrator.db.conftest import QueueDriver
from tests.orchestrator.db.test_queue_stateful import QueueMachine, output


class WatchedMachine(QueueMachine):
    """Everything that can happen to a queue, and commits whose success nobody is told of."""

    recorder: Recorder

    def __init__(self) -> None:
        super().__init__()
        self.queue.execute("DELETE FROM faults_changes")

    @rule(task=QueueMachine.leased)
    def crash_after_commit(self, task: ClaimedTask) -> None:
        good = self.good(task)
        self.queue.database.commit_hook = lambda stage: stage == "before" or 1 // 0
        try:
            self.queue.finish(task.lease, out=None)
        except ZeroDivisionError:
            pass
        finally:
            self.queue.database.commit_hook = None
        if good:
            self.computed[task_key(task.kind, task.version, task.params, task.inputs)] = output(task)

    def teardown(self) -> None:
        super().teardown()
        wanted = self.recorder.sets("job_tasks", "task_id", "job_id")
        sources = self.recorder.sources()
        assert violations(History(self.recorder.changes(), self.recorder.log(), sources, wanted)) == {}


@pytest.fixture
def watched(database_url: str) -> Iterator[type[WatchedMachine]]:
    """The machine on a database that is watched."""
    install(database_url)
    database, recorder = open_database(database_url), Recorder(database_url)
    yield type("Machine", (WatchedMachine,), {"queue": QueueDriver(database), "recorder": recorder})
    recorder.close()
    database.close()


def test_whatever_happens_the_record_keeps_the_rules(watched: type[WatchedMachine]) -> None:
    run_state_machine_as_test(
        watched,
        settings=settings(
            max_examples=4,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
