"""The checker finds what it is there to find: for each rule, a history that keeps it and one that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.faults.checker import CHECKS, bodies_exclusive, failures_explained, violations
from tests.faults.history import Body, Change, History, Logged, Request

TASK, READER, KEY, OTHER_KEY = "a" * 64, "b" * 64, "c" * 64, "d" * 64
BLOB = "e" * 64


class Story:
    """A history as it is told: one row after another, a tenth of a second apart unless said otherwise."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.log: list[Logged] = []
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.now = 1000.0

    def put(self, table: str, name: str, /, **values: Any) -> None:
        """Change a row, or add it."""
        before = self.rows.get((table, name))
        after = {**(before or {}), **values}
        self.rows[table, name] = after
        self._note(table, before, after)

    def remove(self, table: str, name: str) -> None:
        """Delete a row."""
        self._note(table, self.rows.pop((table, name)), None)

    def _note(self, table: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
        self.now += 0.1
        self.changes.append(Change(len(self.changes) + 1, self.now, table, before, after))

    def tell(self, event: str, **about: Any) -> None:
        """Write a line of the log."""
        self.log.append(Logged(len(self.log) + 1, event, **about))

    def job(self, name: str = "job", state: str = "queued") -> None:
        """Submit a job."""
        self.put("jobs", name, id=name, state=state, release=None, digest=None)

    def task(self, name: str = TASK, key: str = KEY) -> None:
        """Add a task that is ready."""
        counts = {"attempt": 0, "faults_task": 0, "faults_infrastructure": 0}
        lease = {"lease_token": None, "lease_until": None, "lease_owner": None}
        self.put("tasks", name, id=name, state="blocked", key=None, **counts, **lease)
        self.put("tasks", name, state="queued", key=key)

    def claim(self, name: str = TASK, token: str = "token", owner: str = "one") -> None:
        """Claim a task for two seconds."""
        attempt = self.rows["tasks", name]["attempt"] + 1
        lease = {"lease_token": token, "lease_until": self.now + 2.0, "lease_owner": owner}
        self.put("tasks", name, state="running", attempt=attempt, **lease)
        self.tell("claimed", task=name, attempt=attempt)

    def finish(self, name: str = TASK, blob: str = BLOB) -> None:
        """Finish a task."""
        row = self.rows["tasks", name]
        self.put("tasks", name, state="succeeded", lease_token=None, lease_until=None)
        self.put("results", row["key"], key=row["key"], outputs={"blob": blob})
        self.tell("finished", task=name, attempt=row["attempt"])

    def expire(self, name: str = TASK) -> None:
        """Let a lease run out and take the task back."""
        row = self.rows["tasks", name]
        self.now = max(self.now, row["lease_until"])
        self.put("tasks", name, state="queued", lease_token=None, lease_until=None, faults_infrastructure=1)
        self.tell("expired", task=name, attempt=row["attempt"])

    def history(self, **more: Any) -> History:
        """Return what was told; everything is wanted by the job called "job"."""
        tasks = {name for table, name in self.rows if table == "tasks"}
        wanted = {"wanted_by": {name: frozenset({"job"}) for name in tasks}}
        return History(tuple(self.changes), tuple(self.log), **(wanted | more))


def good() -> Story:
    """Return a job whose task lost a lease, ran again and was finished; the job succeeded and published."""
    story = Story()
    story.job()
    story.task()
    story.claim(token="first")
    story.put("tasks", TASK, lease_until=story.now + 2.0)
    story.expire()
    story.claim(token="second")
    story.put("jobs", "job", state="running")
    story.finish()
    story.put("releases", "name@1", name="name", version=1, digest=BLOB, job_id="job")
    story.put("jobs", "job", state="succeeded", release="name@1", digest=BLOB)
    return story


def test_history_in_which_all_is_well_has_no_violation() -> None:
    history = good().history(
        requests=(Request("submit", "job"),),
        expected_outputs={KEY: {"blob": BLOB}},
        expected_artifacts={"job": BLOB},
    )
    assert violations(history) == {}


def running() -> Story:
    """Return a job whose task runs."""
    story = Story()
    story.job()
    story.task()
    story.claim()
    return story


def taken_over() -> History:
    story = running()
    story.put("tasks", TASK, attempt=2, lease_token="another")
    return story.history()


def same_key_twice() -> History:
    story = running()
    story.task(READER, KEY)
    story.claim(READER, "another")
    return story.history()


def attempt_skipped() -> History:
    story = running()
    story.expire()
    story.put("tasks", TASK, attempt=7)
    story.claim(token="another")
    return story.history()


def token_used_again() -> History:
    story = running()
    story.expire()
    story.claim(token="token")
    return story.history()


def renewed_too_late() -> History:
    story = running()
    story.now += 5
    story.put("tasks", TASK, lease_until=story.now + 2)
    return story.history()


def finished_too_late() -> History:
    story = running()
    story.now += 5
    story.finish()
    return story.history()


def taken_back_too_early() -> History:
    story = running()
    story.put("tasks", TASK, state="queued", lease_token=None, lease_until=None)
    story.tell("expired", task=TASK, attempt=1)
    return story.history()


def second_result() -> History:
    story = good()
    story.changes.append(Change(99, 2000.0, "results", None, {"key": KEY, "outputs": {"blob": BLOB}}))
    return story.history()


def outputs_changed() -> History:
    story = good()
    story.put("results", KEY, outputs={"blob": OTHER_KEY})
    return story.history()


def success_taken_back() -> History:
    story = good()
    story.put("tasks", TASK, state="blocked")
    return story.history()


def success_twice() -> History:
    story = good()
    row = story.rows["tasks", TASK]
    story.changes.append(Change(99, 2000.0, "tasks", row | {"state": "queued"}, row))
    return story.history()


def finished_claimed_again() -> History:
    story = good()
    story.task(READER, KEY)
    story.claim(READER, "another")
    return story.history()


def claimed_before_its_input() -> History:
    story = running()
    story.task(READER, OTHER_KEY)
    story.claim(READER, "another")
    return story.history(sources={READER: frozenset({TASK})})


def version_skipped() -> History:
    story = good()
    story.put("releases", "name@3", name="name", version=3, digest=KEY, job_id="other")
    return story.history()


def release_changed() -> History:
    story = good()
    story.put("releases", "name@1", digest=KEY)
    return story.history()


def release_deleted() -> History:
    story = good()
    story.remove("releases", "name@1")
    return story.history()


def bytes_published_twice() -> History:
    story = good()
    story.put("releases", "name@2", name="name", version=2, digest=BLOB, job_id="other")
    return story.history()


def job_published_twice() -> History:
    story = good()
    story.put("releases", "name@2", name="name", version=2, digest=KEY, job_id="job")
    return story.history()


def jobs_release_changed() -> History:
    story = good()
    story.put("jobs", "job", release="name@2")
    return story.history()


def cancelled_job_goes_on() -> History:
    story = running()
    story.put("jobs", "job", state="cancelled")
    story.put("jobs", "job", state="queued")
    return story.history()


def claimed_for_nobody() -> History:
    story = Story()
    story.job()
    story.task()
    story.put("jobs", "job", state="cancelled")
    story.claim()
    return story.history()


def job_never_ends() -> History:
    return running().history()


def job_is_gone() -> History:
    return good().history(requests=(Request("submit", "another"),))


def cancel_forgotten() -> History:
    return good().history(requests=(Request("cancel", "job"),))


def retry_forgotten() -> History:
    return good().history(requests=(Request("retry", "job"),))


def failed_too_soon() -> History:
    story = running()
    story.put("tasks", TASK, state="failed", faults_infrastructure=4)
    story.tell("failed", task=TASK, attempt=1, data={"fault": "infrastructure"})
    story.put("jobs", "job", state="failed")
    return story.history()


def failed_without_a_task() -> History:
    story = running()
    story.put("jobs", "job", state="failed")
    return story.history()


def other_outputs() -> History:
    return good().history(expected_outputs={KEY: {"blob": KEY}})


def other_artifact() -> History:
    return good().history(expected_artifacts={"job": KEY})


def bytes_lost() -> History:
    return good().history(damaged=(BLOB,))


def finish_not_told() -> History:
    story = good()
    story.log = [each for each in story.log if each.event != "finished"]
    return story.history()


def finish_told_twice() -> History:
    story = good()
    story.tell("finished", task=TASK, attempt=2)
    return story.history()


def job_unfinished_again() -> History:
    story = good()
    story.put("jobs", "job", state="running")
    return story.history()


def task_gone() -> History:
    story = running()
    story.remove("tasks", TASK)
    return story.history()


BROKEN = {
    "states_legal": (job_unfinished_again, task_gone),
    "leases_exclusive": (
        taken_over,
        same_key_twice,
        attempt_skipped,
        token_used_again,
        finished_too_late,
        taken_back_too_early,
    ),
    "renewals_in_time": (renewed_too_late,),
    "completed_once": (second_result, outputs_changed, success_taken_back, success_twice),
    "finished_not_repeated": (finished_claimed_again,),
    "inputs_first": (claimed_before_its_input,),
    "releases_immutable": (
        version_skipped,
        release_changed,
        release_deleted,
        bytes_published_twice,
        job_published_twice,
        jobs_release_changed,
    ),
    "cancel_wins": (cancelled_job_goes_on, claimed_for_nobody),
    "nothing_lost": (job_never_ends, job_is_gone, cancel_forgotten, retry_forgotten),
    "failures_explained": (failed_too_soon, failed_without_a_task),
    "digests_as_undisturbed": (other_outputs, other_artifact, bytes_lost),
    "log_tells_it": (finish_not_told, finish_told_twice),
}


@pytest.mark.parametrize(
    ("check", "broken"),
    [pytest.param(check, broken, id=f"{check}-{broken.__name__}") for check in BROKEN for broken in BROKEN[check]],
)
def test_checker_finds_what_breaks_a_rule(check: str, broken: Any) -> None:
    assert check in violations(broken())


def test_every_rule_is_tested() -> None:
    assert set(BROKEN) == set(CHECKS)


def test_result_that_was_withdrawn_may_be_made_again() -> None:
    story = good()
    story.job("again")
    story.remove("results", KEY)
    story.put("tasks", TASK, state="blocked")
    story.put("tasks", TASK, state="queued")
    story.claim(token="third")
    story.finish()
    story.put("jobs", "again", state="succeeded")
    assert violations(story.history(wanted_by={TASK: frozenset({"job", "again"})})) == {}


def test_job_whose_blob_is_lost_once_more_may_fail_without_a_task() -> None:
    story = running()
    story.put("jobs", "job", state="failed", error=f"got no blob {KEY} once more")
    assert list(failures_explained(story.history(spoiled_again=frozenset({KEY})))) == []
    assert list(failures_explained(story.history())) != []


def test_job_that_is_cancelled_and_retried_goes_on() -> None:
    story = running()
    story.put("tasks", TASK, state="cancelled", lease_token=None, lease_until=None)
    story.put("jobs", "job", state="cancelled")
    story.put("jobs", "job", state="queued")
    story.tell("retried", job="job")
    story.put("tasks", TASK, state="blocked")
    story.put("tasks", TASK, state="queued")
    story.claim(token="another")
    story.finish()
    story.put("jobs", "job", state="succeeded")
    requests = (Request("cancel", "job"), Request("retry", "job"))
    assert violations(story.history(requests=requests)) == {}


def test_claim_beside_a_cancel_that_has_not_committed_is_allowed() -> None:
    # The transaction that cancels changes the job first here, then the task, which another has claimed in between.
    story = Story()
    story.job()
    story.task()
    story.put("jobs", "job", state="cancelled")
    story.claim()
    story.put("tasks", TASK, state="cancelled", lease_token=None, lease_until=None)
    changes = [replace(each, tx=number) for each, number in zip(story.changes, (1, 1, 1, 3, 2, 3), strict=True)]
    assert violations(replace(story.history(), changes=tuple(changes))) == {}


@pytest.mark.parametrize("expired", [True, False])
def test_bodies_at_once_count_unless_a_lease_ran_out(expired: bool) -> None:
    story = running()
    begun = story.now
    if expired:
        story.expire()
    else:
        story.put("tasks", TASK, state="cancelled", lease_token=None, lease_until=None)
        story.put("tasks", TASK, state="blocked")
        story.put("tasks", TASK, state="queued")
    story.claim(token="another", owner="two")
    bodies = (Body(KEY, "one", begun, story.now + 9), Body(KEY, "two", story.now, story.now + 1))
    assert bool(list(bodies_exclusive(story.history(bodies=bodies)))) is not expired
    apart = (replace(bodies[0], ended=bodies[1].started), bodies[1])
    assert list(bodies_exclusive(story.history(bodies=apart))) == []
