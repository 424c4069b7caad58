"""Leases: claiming, renewing, finishing, failing, giving back, running out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.candidates import candidate_rows, claim_statement
from orchestrator.db.queries import (
    cancel_job,
    claim_tasks,
    finish_task,
    finish_tasks,
    reap_expired,
    release_task,
    renew_leases,
)
from orchestrator.db.queue import INFRASTRUCTURE_BACKOFF, TASK_BACKOFF
from orchestrator.db.rows import Lease, TaskEnd
from orchestrator.errors import ResultError
from orchestrator.graph import Resources, TaskRef, task_node
from orchestrator.scheduling.picker import Places
from workers.execution.cluster import Node

Driver = Any  # the fixture's class lives in conftest.py


def release(queue: Driver, lease: Lease) -> bool:
    with queue.database.session() as session:
        return release_task(session, lease)


def renew(queue: Driver, leases: list[Lease], seconds: float = 60.0) -> list[Lease]:
    with queue.database.session() as session:
        return renew_leases(session, leases, seconds)


def reap(queue: Driver) -> list[str]:
    with queue.database.session() as session:
        return reap_expired(session)


def database_now(queue: Driver) -> float:
    sqlite = queue.database.engine.dialect.name == "sqlite"
    clock = "(julianday('now') - 2440587.5) * 86400" if sqlite else "extract(epoch from clock_timestamp())"
    return float(queue.rows(f"SELECT {clock} AS now")[0]["now"])


# Claiming


def test_claim_tasks_takes_the_highest_priority_then_the_oldest(queue: Driver) -> None:
    low = [queue.node(f"low {number}") for number in range(3)]
    high = [queue.node(f"high {number}") for number in range(2)]
    queue.submit(low)
    queue.submit(high, priority=5)
    assert [task.label for task in queue.claim(4)] == ["high 0", "high 1", "low 0", "low 1"]
    assert [task.label for task in queue.claim(4)] == ["low 2"]
    assert queue.claim(4) == []


def test_claim_tasks_gives_everything_that_a_worker_needs(queue: Driver) -> None:
    first = queue.node("first", resources=Resources(2.0, 0.5, 7), work=3.5)
    last = task_node("noop", {"z": 1, "a": [None, 2.5]}, {"z": [TaskRef(first.id, "out")], "a": ["f" * 64, "0" * 64]})
    job = queue.submit([first, last])
    (task,) = queue.claim()
    assert (task.kind, task.version, task.params) == ("noop", 1, {"name": "first"})
    assert (task.resources, task.work, task.label) == (Resources(2.0, 0.5, 7), 3.5, "first")
    assert task.lease.attempt == 1
    assert len(task.lease.token) == 32
    assert queue.job(job).state == "running"
    queue.finish(task.lease, "bytes of first")
    (task,) = queue.claim()
    assert list(task.inputs.items()) == [("z", [queue.digest("bytes of first")]), ("a", ["f" * 64, "0" * 64])]
    assert list(task.params) == ["z", "a"]


def test_claim_tasks_does_not_claim_a_key_that_is_running(queue: Driver) -> None:
    # Two roots of different code versions give the same bytes, so their readers differ in id and share a key.
    roots = [queue.node("root", version=version) for version in (1, 2)]
    readers = [queue.node("reader", root) for root in roots]
    assert readers[0].id != readers[1].id
    jobs = [queue.submit([root, reader]) for root, reader in zip(roots, readers, strict=True)]
    for task in queue.claim(2):
        assert queue.finish(task.lease, "same bytes")
    assert queue.states(*readers) == ["queued", "queued"]
    claimed = queue.claim(5)
    assert [task.lease.task_id for task in claimed] == [readers[0].id]
    assert queue.claim(5) == []
    other = queue.node("other")
    queue.submit([other])
    # What cannot be claimed does not use up the limit.
    queue.finish(queue.take(other))
    assert queue.finish(claimed[0].lease)
    assert queue.states(*readers) == ["succeeded", "succeeded"]
    assert [queue.job(job).state for job in jobs] == ["succeeded", "succeeded"]
    assert queue.rows("SELECT count(*) AS n FROM results")[0]["n"] == len([*roots, other]) + 1


def test_claim_tasks_runs_a_twin_when_the_first_failed(queue: Driver) -> None:
    roots = [queue.node("root", version=version) for version in (1, 2)]
    readers = [queue.node("reader", root) for root in roots]
    for root, reader in zip(roots, readers, strict=True):
        queue.submit([root, reader])
    for task in queue.claim(2):
        queue.finish(task.lease, "same bytes")
    queue.fail(queue.take(readers[0]), "invalid")
    assert queue.states(*readers) == ["failed", "queued"]
    queue.take(readers[1])


def test_claim_tasks_leaves_a_key_that_someone_is_claiming(queue: Driver, backend: str) -> None:
    roots = [queue.node("root", version=version) for version in (1, 2)]
    readers = [queue.node("reader", root) for root in roots]
    other = queue.node("other")
    for root, reader in zip(roots, readers, strict=True):
        queue.submit([root, reader])
    for task in queue.claim(2):
        queue.finish(task.lease, "same bytes")
    queue.submit([other])
    with ThreadPoolExecutor(1) as pool:
        with queue.database.session() as session:
            mine = claim_tasks(session, owner="me", limit=1, lease_seconds=60)
            theirs = pool.submit(queue.claim, 5)
            if backend == "postgres":
                # Without waiting; on SQLite it waits for the transaction.
                theirs.result(30)
        claimed = theirs.result(30)
    assert [task.lease.task_id for task in mine] == [readers[0].id]
    assert [task.lease.task_id for task in claimed] == [other.id]
    assert queue.states(*readers) == ["running", "queued"]


def test_claim_tasks_of_many_claimers_never_overlap(queue: Driver) -> None:
    queue.submit([queue.node(number) for number in range(60)])
    barrier = threading.Barrier(4)

    def claim_all(_: int) -> list[str]:
        barrier.wait()
        mine: list[str] = []
        while claimed := queue.claim(3):
            mine += [task.lease.task_id for task in claimed]
        return mine

    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(claim_all, range(4)))
    everyone = [task for mine in claims for task in mine]
    assert len(everyone) == len(set(everyone)) == 60


def test_claim_tasks_skips_rows_that_another_claimer_holds(queue: Driver, backend: str) -> None:
    queue.submit([queue.node("first"), queue.node("second")])
    with queue.database.session() as session:
        first = claim_tasks(session, owner="me", limit=1, lease_seconds=60)
        if backend == "postgres":
            # Without waiting: on SQLite the second would wait for the transaction and get the same.
            assert [task.label for task in queue.claim(1)] == ["second"]
    assert [task.label for task in first] == ["first"]
    assert [task.label for task in queue.claim(1)] == ([] if backend == "postgres" else ["second"])


# Fencing

LEASE_USES: list[Callable[[Driver, Lease], Any]] = [
    lambda queue, lease: queue.finish(lease),
    lambda queue, lease: queue.fail(lease),
    lambda queue, lease: queue.fail(lease, "infrastructure"),
    lambda queue, lease: queue.fail(lease, "invalid"),
    release,
    lambda queue, lease: bool(renew(queue, [lease])),
]


@pytest.mark.parametrize("loss", ["expired", "reaped", "claimed again", "token", "attempt", "finished", "cancelled"])
def test_a_lost_lease_is_refused_and_changes_nothing(queue: Driver, loss: str) -> None:
    node, after = queue.node("node"), queue.node("after")
    job = queue.submit([node, after, queue.node("last", node, after)])
    lease = queue.take(node)
    if loss == "token":
        lease = Lease(lease.task_id, lease.attempt, "0" * 32)
    elif loss == "attempt":
        lease = Lease(lease.task_id, lease.attempt + 1, lease.token)
    elif loss == "finished":
        assert queue.finish(lease)
    elif loss == "cancelled":
        with queue.database.session() as session:
            assert cancel_job(session, job)
    else:
        queue.expire(lease)
        if loss != "expired":
            assert reap(queue) == [node.id]
        if loss == "claimed again":
            queue.skip_backoff()
            assert queue.take(node).attempt == 2
    before = queue.snapshot()
    for use in LEASE_USES:
        assert use(queue, lease) is False
    assert queue.snapshot() == before


def test_the_lease_of_the_second_attempt_works_where_the_first_does_not(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    first = queue.take(node, lease_seconds=-1.0)
    reap(queue)
    queue.skip_backoff()
    second = queue.take(node)
    assert not queue.finish(first, "from the first")
    assert queue.finish(second, "from the second")
    assert queue.job(job).state == "succeeded"
    outputs = queue.rows("SELECT outputs FROM results")[0]["outputs"]
    assert queue.digest("from the second") in str(outputs)


def test_renew_leases_returns_the_good_ones_in_order_and_extends_them(queue: Driver) -> None:
    nodes = [queue.node(number) for number in range(4)]
    queue.submit(nodes)
    leases = [task.lease for task in queue.claim(4)]
    queue.expire(leases[1])
    queue.finish(leases[2])
    now = database_now(queue)
    assert renew(queue, [leases[3], leases[2], leases[1], leases[0]], 500.0) == [leases[3], leases[0]]
    assert queue.task(nodes[0])["lease_until"] == pytest.approx(now + 500, abs=5)
    assert renew(queue, []) == []


def test_renew_leases_late_renews_what_ran_out_and_nobody_has_taken(queue: Driver) -> None:
    nodes = [queue.node(number) for number in range(3)]
    queue.submit(nodes)
    leases = [task.lease for task in queue.claim(3)]
    for lease in leases:
        queue.expire(lease)
    with queue.database.session() as session:
        assert renew_leases(session, leases[:2], 60.0, late=True) == leases[:2]
    assert reap(queue) == [nodes[2].id]
    with queue.database.session() as session:
        assert renew_leases(session, leases, 60.0, late=True) == leases[:2]
    assert queue.finish(leases[0])


def test_release_task_says_what_was_out(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    lease = queue.take(node)
    with queue.database.session() as session:
        assert release_task(session, lease, "the store is full\0")
    assert queue.task(node)["faults_task"] + queue.task(node)["faults_infrastructure"] == 0
    (row,) = queue.rows("SELECT data FROM events WHERE event = 'released'")
    assert "the store is full" in str(row["data"])


# Finishing


def test_finish_task_queues_the_readers_that_have_everything(queue: Driver) -> None:
    a, b = queue.node("a"), queue.node("b")
    both, one = queue.node("both", a, b), queue.node("one", a)
    last = queue.node("last", both, one)
    job = queue.submit([a, b, both, one, last])
    assert queue.states(both, one, last) == ["blocked", "blocked", "blocked"]
    claimed = queue.claim(2)
    queue.finish(claimed[0].lease)
    assert queue.states(both, one, last) == ["blocked", "queued", "blocked"]
    queue.finish(claimed[1].lease)
    assert queue.states(both, one, last) == ["queued", "queued", "blocked"]
    assert queue.job(job).state == "running"
    assert queue.work() == ["both", "one", "last"]
    row = queue.job(job)
    assert row.state == "succeeded"
    assert row.created_at <= row.started_at <= row.finished_at
    assert (row.digest, row.release, row.error) == (None, None, None)


@pytest.mark.parametrize("others", [1, 2])
def test_finish_tasks_counts_readers_down_for_good_leases_alone(queue: Driver, others: int) -> None:
    """As when the answer to a commit is lost: what it recorded is reported again, with what ended since."""
    sources = [queue.node(number) for number in range(others + 1)]
    reader = queue.node("reader", *sources)
    queue.submit([*sources, reader])
    *told, last = [TaskEnd(queue.take(node), {"out": queue.digest(node.id)}, {}, 1.0) for node in sources]
    for ends, kept in (told, [end.lease for end in told]), (told, []), ([*told, last], [last.lease]):
        assert queue.task(reader)["waiting"] > 0
        assert queue.database.transact(lambda session, ends=ends: finish_tasks(session, ends)) == kept
    assert queue.states(reader) == ["queued"]


def test_finish_task_counts_a_reader_of_two_outputs_once(queue: Driver) -> None:
    source = queue.node("source")
    reader = task_node("noop", {}, {"x": [TaskRef(source.id, "out"), TaskRef(source.id, "out")]})
    queue.submit([source, reader])
    queue.finish(queue.take(source))
    assert queue.states(reader) == ["queued"]


@pytest.mark.parametrize("metrics", [{"psnr_db": float("inf")}, {"a": [{"b": float("nan")}]}, {"a": {1, 2}}])
def test_finish_task_refuses_metrics_that_json_has_not(queue: Driver, metrics: dict[str, Any]) -> None:
    node = queue.node("node")
    queue.submit([node])
    lease = queue.take(node)
    before = queue.snapshot()
    with pytest.raises(ResultError, match="metrics cannot be recorded"):
        queue.finish(lease, metrics=metrics)
    with pytest.raises(ResultError, match="wanted a sha256 digest"), queue.database.session() as session:
        finish_task(session, lease, {"out": "somewhere"}, {}, 1.0)
    assert queue.snapshot() == before


def test_finish_task_is_all_or_nothing(queue: Driver) -> None:
    first, last = queue.node("first"), queue.node("last", queue.node("first"))
    queue.submit([first, last])
    lease = queue.take(first)
    before = queue.snapshot()
    queue.database.commit_hook = crash_at("before")
    with pytest.raises(OSError, match="power cut"):
        queue.finish(lease)
    queue.database.commit_hook = None
    assert queue.snapshot() == before
    queue.database.commit_hook = crash_at("after")
    with pytest.raises(OSError, match="power cut"):
        queue.finish(lease)
    queue.database.commit_hook = None
    assert queue.states(first, last) == ["succeeded", "queued"]
    after = queue.snapshot()
    assert not queue.finish(lease)
    assert queue.snapshot() == after


def crash_at(stage: str) -> Callable[[str], None]:
    def hook(reached: str) -> None:
        if reached == stage:
            raise OSError("power cut")

    return hook


# Faults


@pytest.mark.parametrize(
    ("fault", "waits"), [("task", TASK_BACKOFF), ("infrastructure", INFRASTRUCTURE_BACKOFF), ("invalid", ())]
)
def test_fail_task_waits_longer_each_time_and_then_fails_for_good(
    queue: Driver, fault: str, waits: tuple[float, ...]
) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    for number, wait in enumerate(waits, 1):
        lease = queue.take(node)
        assert lease.attempt == number
        now = database_now(queue)
        assert queue.fail(lease, fault, f"error {number}")
        row = queue.task(node)
        assert (row["state"], row["error"]) == ("queued", f"error {number}")
        assert row["not_before"] == pytest.approx(now + wait, abs=0.5)
        assert queue.claim() == []
        assert queue.job(job).state == "running"
        queue.skip_backoff()
    assert queue.fail(queue.take(node), fault, "the last error")
    assert queue.states(node) == ["failed"]
    row = queue.job(job)
    assert (row.state, row.error) == ("failed", "the last error")
    assert row.finished_at is not None


def test_fail_task_limits_are_three_of_its_own_and_ten_of_the_infrastructure() -> None:
    assert len(TASK_BACKOFF) + 1 == 3
    assert len(INFRASTRUCTURE_BACKOFF) + 1 == 10


def test_a_task_runs_again_once_its_wait_is_over(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    queue.fail(queue.take(node), "infrastructure")
    assert queue.claim() == []
    time.sleep(INFRASTRUCTURE_BACKOFF[0] + 0.05)
    queue.take(node)


def test_fail_task_counts_the_infrastructure_apart(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    for _ in range(len(INFRASTRUCTURE_BACKOFF)):
        queue.fail(queue.take(node), "infrastructure")
        queue.skip_backoff()
    for _ in range(len(TASK_BACKOFF)):
        queue.fail(queue.take(node), "task")
        queue.skip_backoff()
    row = queue.task(node)
    assert (row["faults_task"], row["faults_infrastructure"], row["state"]) == (2, 9, "queued")
    assert queue.finish(queue.take(node))
    assert queue.task(node)["error"] is None


def test_fail_task_keeps_any_error_text(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    queue.fail(queue.take(node), "invalid", "nul \0, half \ud800, long " + "x" * 20_000)
    error = queue.job(job).error
    assert error.startswith("nul \N{REPLACEMENT CHARACTER}, half ?, long xxx")
    assert len(error) == 10_000


def test_a_missed_deadline_is_the_infrastructures_fault_once_and_then_the_tasks_own(queue: Driver) -> None:
    node = queue.node("slow")
    queue.submit([node])
    counted = []
    for _ in range(3):
        assert queue.fail(queue.take(node), "deadline", "it took too long")
        counted.append(tuple(queue.task(node)[name] for name in ("faults_infrastructure", "faults_task")))
        queue.skip_backoff()
    assert counted == [(1, 0), (1, 1), (1, 2)]
    assert queue.fail(queue.take(node), "deadline", "it took too long")
    assert queue.states(node) == ["failed"]


def test_fail_task_knows_only_three_faults(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    with pytest.raises(KeyError, match="bad luck"):
        queue.fail(queue.take(node), "bad luck")


def test_release_task_gives_back_at_once_and_counts_no_fault(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node])
    for attempt in range(1, 15):
        lease = queue.take(node)
        assert lease.attempt == attempt
        assert release(queue, lease)
    row = queue.task(node)
    assert (row["faults_task"], row["faults_infrastructure"], row["not_before"]) == (0, 0, 0)


def test_reap_expired_takes_back_only_what_ran_out(queue: Driver) -> None:
    dead, alive = queue.node("dead"), queue.node("alive")
    queue.submit([dead, alive])
    claimed = queue.claim(2)
    assert reap(queue) == []
    queue.expire(claimed[0].lease)
    now = database_now(queue)
    assert reap(queue) == [dead.id]
    assert reap(queue) == []
    row = queue.task(dead)
    assert (row["state"], row["faults_infrastructure"], row["faults_task"]) == ("queued", 1, 0)
    assert row["not_before"] == pytest.approx(now + INFRASTRUCTURE_BACKOFF[0], abs=0.5)
    assert row["error"] == "the lease of test on attempt 1 ran out"
    assert queue.states(alive) == ["running"]


def test_reap_expired_fails_a_task_that_loses_every_worker(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    for _ in range(len(INFRASTRUCTURE_BACKOFF) + 1):
        queue.skip_backoff()
        queue.take(node, lease_seconds=-1.0)
        assert reap(queue) == [node.id]
    assert queue.states(node) == ["failed"]
    assert queue.job(job).state == "failed"


# The plan of the claim

HISTORY = """
    INSERT INTO tasks (id, kind, version, params, inputs, cpus, gpus, memory_bytes, work, label, state, waiting, key,
                       priority, not_before, attempt, faults_task, faults_infrastructure, finished_at)
    SELECT 'old-' || n, 'noop', 1, '{}', '{}', 1, 0, 0, 0, '', 'succeeded', 0, 'key-' || n, 0, 0, 1, 0, 0, 1
    FROM (WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 20000)
          SELECT n FROM numbers) AS history
"""


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_claim_tasks_reads_the_heads_of_an_index_whatever_the_history(queue: Driver, backend: str, gpus: float) -> None:
    queue.execute(HISTORY)
    queue.submit([queue.node(number) for number in range(300)])
    queue.claim(20)
    queue.execute("ANALYZE")
    plan = explain_claim(queue, backend, gpus)
    read = [
        line for line in plan if "INDEX ix_tasks" in line or "Scan using ix_tasks_q" in line or line == "SCAN tasks"
    ]
    assert len(read) >= 3
    assert all("ix_tasks_queued_needs" in line for line in read)
    assert not any("Seq Scan on tasks" in line for line in plan)
    assert not any("Sort" in line or "TEMP B-TREE" in line for line in plan)


def explain_claim(queue: Driver, backend: str, gpus: float) -> list[str]:
    """Return the database's plans for the very statements that claim."""
    from sqlalchemy import event

    seen: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, values: Any, context: Any, many: bool) -> None:
        seen.append((statement, values))

    event.listen(queue.database.engine, "before_cursor_execute", note)
    with queue.database.session() as session:
        assert len(candidate_rows(session, 8, gpus)) == 8
        event.remove(queue.database.engine, "before_cursor_execute", note)
        prefix = "EXPLAIN QUERY PLAN " if backend == "sqlite" else "EXPLAIN "
        plans = [session.connection().exec_driver_sql(prefix + statement, values).all() for statement, values in seen]
    return [row[3 if backend == "sqlite" else 0] for plan in plans for row in plan]


def test_claim_tasks_passes_over_what_has_no_gpu_a_group_at_a_time(queue: Driver, backend: str) -> None:
    """Thousands of tasks in front for which there is no GPU cost as much as one."""
    small = [queue.node(f"small {number}") for number in range(20)]
    large = [queue.node(f"large {number}", resources=Resources(1.0, 1.0, 0)) for number in range(3000)]
    places = Places(1.0)
    places.look((Node("cpus", "cpus", 4.0, 10**9),))
    queue.submit([*large[:1], *small])
    few = touched_by_claim(queue, backend, places)
    queue.submit([*large, queue.node("last")], priority=1)
    queue.execute("ANALYZE")
    assert touched_by_claim(queue, backend, places) <= few + 50
    assert [task.label for task in queue.claim(2, picker=places.picker(2))] == ["last", "small 0"]


def test_claim_tasks_reads_few_rows_whatever_the_history(queue: Driver, backend: str) -> None:
    """Count what is really touched: the same for an empty history and a long one."""
    queue.submit([queue.node(number) for number in range(300)])
    few = touched_by_claim(queue, backend)
    queue.execute(HISTORY)
    queue.execute("ANALYZE")
    assert touched_by_claim(queue, backend) <= few + 50


def touched_by_claim(queue: Driver, backend: str, places: Places | None = None) -> int:
    picker = None if places is None else places.picker(8)
    with queue.database.session() as session:
        if backend == "postgres":
            values = {"gpus": 1e9 if picker is None else picker.gpus()[0], "gpu_types": None, "limit": 8}
            statement = claim_statement(session).postgresql.text
            plan = session.scalar(text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"), values)
            return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += 1

        raw = session.connection().connection.dbapi_connection
        raw.set_progress_handler(count, 10)
        claim_tasks(session, owner="test", limit=8, lease_seconds=60, picker=picker)
        raw.set_progress_handler(None, 0)
        session.rollback()
        session.info["events"].clear()
        return steps
