"""Jobs: ending, retrying, looking at them, and the log of events."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.db.queries import (
    cancel_job,
    claim_tasks,
    create_job,
    events,
    find_job,
    find_model,
    find_task,
    job_counts,
    job_kinds,
    list_jobs,
    list_tasks,
    renew_leases,
    retry_job,
    work_left,
)
from orchestrator.db.rows import EventRow, KindRow
from orchestrator.errors import NotFoundError
from orchestrator.states import JobState, TaskState
from quant_spec.errors import InvalidInputError

Driver = Any  # the fixture's class lives in conftest.py


def cancel(queue: Driver, job: str) -> bool:
    with queue.database.session() as session:
        return cancel_job(session, job)


def retry(queue: Driver, job: str) -> None:
    with queue.database.session() as session:
        retry_job(session, job)


def log(queue: Driver, job: str, after_id: int = 0, limit: int = 1000) -> list[EventRow]:
    with queue.database.session(read_only=True) as session:
        return events(session, job, after_id, limit)


def counts(queue: Driver, job: str) -> dict[str, int]:
    with queue.database.session(read_only=True) as session:
        return job_counts(session, job)


# Finding


def test_find_job_takes_a_unique_prefix(queue: Driver) -> None:
    job = queue.submit([queue.node("node")])
    for prefix in (job, job[:5], job[:1]):
        assert queue.job(prefix).id == job
    row = queue.job(job)
    assert (row.model_name, row.model_digest) == ("model", queue.digest("model"))
    assert (row.recipe_name, row.recipe, row.recipe_digest) == ("recipe", {"bits": 4}, queue.digest("recipe"))
    queue.execute("INSERT INTO jobs SELECT * FROM jobs WHERE false")
    other = job[:8] + ("0000" if job[8:] != "0000" else "1111")
    columns = "state, priority, model_name, model_digest, recipe_name, recipe_digest, recipe, created_at"
    queue.execute(f"INSERT INTO jobs (id, {columns}) SELECT :other, {columns} FROM jobs", other=other)
    assert queue.job(job).id == job
    with pytest.raises(InvalidInputError, match="fits several"):
        queue.job(job[:8])


def test_find_job_finds_nothing_by_what_is_no_prefix(queue: Driver) -> None:
    queue.submit([queue.node("node")])
    for prefix in ("", "zz", "%", "_", "0123456789abc", "ABC", "é"):
        with pytest.raises(NotFoundError, match="wanted one of jobs ls") as error:
            queue.job(prefix)
        assert error.value.exit_code == 102


def test_list_jobs_is_newest_first_and_filters(queue: Driver) -> None:
    jobs = [queue.submit([queue.node(number)]) for number in range(3)]
    cancel(queue, jobs[1])
    with queue.database.session() as session:
        assert [row.id for row in list_jobs(session)] == jobs[::-1]
        assert [row.id for row in list_jobs(session, limit=2)] == [jobs[2], jobs[1]]
        assert [row.id for row in list_jobs(session, states=[JobState.CANCELLED])] == [jobs[1]]


def test_create_job_refuses_bad_names_and_priorities(queue: Driver) -> None:
    queue.submit([queue.node("node")])
    before = queue.snapshot()
    names = {"recipe_name": "r", "recipe": {}, "recipe_digest": queue.digest("r")}
    for wrong in ({"release_name": "Not A Name"}, {"release_name": "../up"}, {"priority": 2**31}):
        with pytest.raises(InvalidInputError), queue.database.session() as session:
            create_job(session, model=find_model(session, "model"), **names, **wrong)
    assert queue.snapshot() == before


def test_work_left_while_a_job_is_active(queue: Driver) -> None:
    def left() -> bool:
        with queue.database.session(read_only=True) as session:
            return work_left(session)

    assert not left()
    node = queue.node("node")
    queue.submit([node])
    assert left()
    lease = queue.take(node)
    assert left()
    queue.finish(lease)
    assert not left()


# Cancelling


def test_cancel_job_spares_what_another_job_wants(queue: Driver) -> None:
    shared, mine, yours = queue.node("shared"), queue.node("mine"), queue.node("yours")
    first = queue.submit([shared, mine, queue.node("end of mine", shared, mine)])
    second = queue.submit([shared, yours])
    leases = {task.label: task.lease for task in queue.claim(3)}
    assert cancel(queue, first)
    assert queue.job(first).state == "cancelled"
    assert queue.job(first).finished_at is not None
    assert queue.states(shared, mine, yours) == ["running", "cancelled", "running"]
    with queue.database.session() as session:
        still = renew_leases(session, list(leases.values()), 60)
    assert still == [leases["shared"], leases["yours"]]
    assert not queue.finish(leases["mine"])
    assert queue.finish(leases["shared"])
    assert queue.finish(leases["yours"])
    assert queue.job(second).state == "succeeded"
    assert queue.claim() == []


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_cancel_job_leaves_an_ended_job_alone(queue: Driver, end: str) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    end_job(queue, job, node, end)
    before = queue.snapshot()
    assert cancel(queue, job) is False
    assert queue.snapshot() == before
    with pytest.raises(NotFoundError):
        cancel(queue, "0" * 12)


def end_job(queue: Driver, job: str, node: Any, end: str) -> None:
    if end == "succeeded":
        queue.finish(queue.take(node))
    elif end == "failed":
        queue.fail(queue.take(node), "invalid")
    else:
        cancel(queue, job)
    assert queue.job(job).state == end


# Failing


def test_a_failed_task_fails_every_job_that_needs_it_and_frees_the_rest(queue: Driver) -> None:
    bad, kept, lone = queue.node("bad"), queue.node("kept"), queue.node("lone")
    first = queue.submit([bad, kept, lone, queue.node("end 1", bad, kept, lone)])
    second = queue.submit([bad, queue.node("end 2", bad)])
    third = queue.submit([kept, queue.node("end 3", kept)])
    leases = {task.label: task.lease for task in queue.claim(3)}
    queue.fail(leases["bad"], "invalid", "weights hold NaN")
    for job in (first, second):
        row = queue.job(job)
        assert (row.state, row.error) == ("failed", "weights hold NaN")
    assert queue.job(third).state == "running"
    assert queue.states(bad, kept, lone) == ["failed", "running", "cancelled"]
    assert counts(queue, first) == {
        "total": 4, "cached": 0, "succeeded": 0, "failed": 1, "running": 1, "queued": 0,
    }  # fmt: skip
    queue.finish(leases["kept"])
    assert queue.work() == ["end 3"]
    assert queue.job(third).state == "succeeded"


def test_a_job_ends_with_its_target_and_cancels_what_it_no_longer_needs(queue: Driver) -> None:
    target, extra, both = queue.node("target"), queue.node("extra"), queue.node("both")
    job = queue.submit([target, extra, both], target)
    other = queue.submit([both])
    queue.finish(queue.take(target))
    assert queue.job(job).state == "succeeded"
    assert queue.states(extra, both) == ["cancelled", "queued"]
    queue.work()
    assert queue.job(other).state == "succeeded"


# Retrying


def test_retry_job_runs_what_failed_and_keeps_what_succeeded(queue: Driver) -> None:
    done, bad = queue.node("done"), queue.node("bad")
    last = queue.node("last", done, bad)
    job = queue.submit([done, bad, last], priority=3)
    queue.finish(queue.take(done))
    for _ in range(3):
        queue.fail(queue.take(bad))
        queue.skip_backoff()
    assert queue.job(job).state == "failed"
    assert queue.states(done, bad, last) == ["succeeded", "failed", "cancelled"]
    retry(queue, job)
    row = queue.job(job)
    assert (row.state, row.error, row.started_at, row.finished_at) == ("queued", None, None, None)
    assert queue.states(done, bad, last) == ["succeeded", "queued", "blocked"]
    # Three new tries: the old faults are forgiven.
    for _ in range(2):
        queue.fail(queue.take(bad))
        queue.skip_backoff()
    assert queue.work() == ["bad", "last"]
    assert queue.job(job).state == "succeeded"


def test_retry_job_of_a_cancelled_job_goes_on_where_it_was(queue: Driver) -> None:
    first = queue.node("first")
    second = queue.node("second", first)
    job = queue.submit([first, second])
    lease = queue.take(first)
    cancel(queue, job)
    retry(queue, job)
    assert not queue.finish(lease)
    queue.skip_backoff()
    assert queue.work() == ["first", "second"]
    assert queue.task(first)["attempt"] == 2
    assert queue.job(job).state == "succeeded"


def test_retry_job_ends_at_once_if_another_job_did_the_work(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    cancel(queue, job)
    queue.submit([node])
    queue.work()
    assert queue.job(job).state == "cancelled"
    retry(queue, job)
    assert queue.job(job).state == "succeeded"


@pytest.mark.parametrize("state", ["queued", "running", "succeeded"])
def test_retry_job_refuses_a_job_that_did_not_fail(queue: Driver, state: str) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    if state != "queued":
        lease = queue.take(node)
        if state == "succeeded":
            queue.finish(lease)
    before = queue.snapshot()
    with pytest.raises(InvalidInputError, match=f"got state {state}, wanted cancelled or failed"):
        retry(queue, job)
    with pytest.raises(NotFoundError):
        retry(queue, "0" * 12)
    assert queue.snapshot() == before


# Looking


def test_job_counts_and_kinds_follow_the_tasks(queue: Driver) -> None:
    old = queue.node("old", kind="round", work=4.0)
    queue.submit([old])
    queue.work()
    tasks = [queue.node(number, old, kind="reconstruct", work=2.0) for number in range(4)]
    last = queue.node("last", *tasks, kind="pack", work=1.0)
    job = queue.submit([old, *tasks, last])
    claimed = queue.claim(3)
    queue.finish(claimed[0].lease, seconds=5.0)
    queue.finish(claimed[1].lease, seconds=7.0)
    assert counts(queue, job) == {
        "total": 6, "cached": 1, "succeeded": 3, "failed": 0, "running": 1, "queued": 2,
    }  # fmt: skip
    with queue.database.session(read_only=True) as session:
        kinds = job_kinds(session, job)
    zero: dict[str, float] = {"cached": 0, "succeeded": 0, "failed": 0, "cancelled": 0, "running": 0, "queued": 0}
    zero |= {"seconds": 0.0, "work": 0.0, "work_left": 0.0}
    assert kinds == [
        KindRow(**{"kind": "round", "total": 1, **zero, "cached": 1, "succeeded": 1}),
        KindRow(
            **{"kind": "reconstruct", "total": 4, **zero, "succeeded": 2, "running": 1, "queued": 1}
            | {"seconds": 12.0, "work": 4.0, "work_left": 4.0}
        ),
        KindRow(**{"kind": "pack", "total": 1, **zero, "queued": 1, "work_left": 1.0}),
    ]


def test_list_tasks_shows_results_as_recorded(queue: Driver) -> None:
    first = queue.node("first")
    last = queue.node("last", first, kind="pack")
    job = queue.submit([first, last])
    queue.finish(queue.take(first), "bytes", {"error_db": 31.5, "layers": {"b": 1, "a": 2}}, seconds=4.5)
    with queue.database.session(read_only=True) as session:
        one, two = list_tasks(session, job)
        assert [task.kind for task in list_tasks(session, job, kind="pack")] == ["pack"]
        assert find_task(session, job, first.id) == one
        with pytest.raises(NotFoundError):
            find_task(session, job, "0" * 64)
    assert (one.id, one.state, one.label, one.attempt, one.seconds) == (first.id, "succeeded", "first", 1, 4.5)
    assert one.outputs == {"out": queue.digest("bytes")}
    assert one.metrics == {"error_db": 31.5, "layers": {"b": 1, "a": 2}}
    assert list(one.metrics["layers"]) == ["b", "a"]
    assert one.started_at is not None
    assert one.finished_at >= one.started_at
    assert (two.state, two.seconds, two.outputs, two.metrics, two.cached) == ("queued", None, None, None, False)
    assert isinstance(one.state, TaskState)


def test_events_tell_the_story_of_a_job_in_order(queue: Driver) -> None:
    first = queue.node("first")
    last = queue.node("last", first)
    job = queue.submit([first, last], priority=2)
    queue.fail(queue.take(first), "infrastructure", "node lost")
    queue.skip_backoff()
    queue.finish(queue.take(first))
    queue.finish(queue.take(last))
    story = log(queue, job)
    names = {first.id: "first", last.id: "last", None: "job"}
    assert [(names[each.task], each.event, each.attempt) for each in story] == [
        ("job", "created", None),
        ("first", "promoted", None),
        ("first", "claimed", 1),
        ("job", "started", None),
        ("first", "retried", 1),
        ("first", "claimed", 2),
        ("first", "finished", 2),
        ("last", "promoted", None),
        ("last", "claimed", 1),
        ("last", "finished", 1),
        ("job", "succeeded", None),
    ]
    assert story[0].data == {"model": "model", "recipe": "recipe", "priority": 2}
    assert story[2].data == {"owner": "test"}
    assert story[4].data == {"fault": "infrastructure", "faults": 1, "delay": 1.0, "error": "node lost"}
    assert [each.id for each in story] == sorted({each.id for each in story})
    assert [each.at for each in story] == sorted(each.at for each in story)


def test_events_can_be_followed_and_leave_out_what_is_not_the_job_s(queue: Driver) -> None:
    shared, other = queue.node("shared"), queue.node("other")
    queue.submit([shared, other])
    queue.fail(queue.take(shared))
    queue.skip_backoff()
    job = queue.submit([shared, queue.node("last", shared)])
    seen = log(queue, job)
    assert [each.event for each in seen] == ["created"]
    queue.finish(queue.take(shared))
    queue.finish(queue.take(other))
    fresh = log(queue, job, after_id=seen[-1].id)
    assert [each.event for each in fresh] == ["claimed", "started", "finished", "promoted"]
    paged = [log(queue, job, after_id=fresh[number - 1].id if number else seen[-1].id, limit=1) for number in range(4)]
    assert [each for page in paged for each in page] == fresh
    assert log(queue, job, after_id=fresh[-1].id) == []


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
def test_events_get_their_numbers_in_the_order_of_commits(queue: Driver) -> None:
    """One who follows the log would otherwise miss what a slower transaction writes behind his back."""
    nodes = [queue.node(number) for number in range(2)]
    job = queue.submit(nodes)
    seen: list[EventRow] = []
    with ThreadPoolExecutor(1) as pool:

        def while_the_slow_one_commits(stage: str) -> None:
            queue.database.commit_hook = None
            quick = pool.submit(queue.claim)
            # It claims the other task, and must not have its events numbered and seen before the slow one's.
            deadline = time.monotonic() + 30
            while not quick.done() and not queue.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory'"):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            seen.extend(log(queue, job))

        with queue.database.session() as slow:
            (mine,) = claim_tasks(slow, owner="slow", limit=1, lease_seconds=60)
            queue.database.commit_hook = while_the_slow_one_commits
    later = log(queue, job, after_id=seen[-1].id)
    claims = [(each.task, each.data["owner"]) for each in [*seen, *later] if each.event == "claimed"]
    assert mine.lease.task_id == nodes[0].id
    assert claims == [(nodes[0].id, "slow"), (nodes[1].id, "test")]


def test_a_transaction_that_fails_leaves_no_events(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    lease = queue.take(node)
    before = log(queue, job)
    queue.database.commit_hook = lambda stage: 1 // 0
    with pytest.raises(ZeroDivisionError):
        queue.finish(lease)
    queue.database.commit_hook = None
    assert log(queue, job) == before
    with queue.database.session() as session:
        assert find_job(session, job).state == "running"
