"""Transactions on Postgres that finish tasks beside each other: none waits needlessly, none misses another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db.queries import claim_tasks, events, finish_task, finish_tasks, renew_leases
from orchestrator.db.rows import TaskEnd
from orchestrator.db.session import lock_graph, share_graph
from orchestrator.errors import ConflictError

Driver = Any  # the fixture's class lives in conftest.py
pytestmark = pytest.mark.parametrize("backend", ["postgres"], indirect=True)


def end(queue: Driver, task: Any, out: str | None = None) -> TaskEnd:
    return TaskEnd(task.lease, {"out": queue.digest(out or task.lease.task_id)}, {}, 1.0)


def waits(queue: Driver, future: Future[Any]) -> bool:
    """Return True once a transaction waits for a lock, False if what was started is done."""
    deadline = time.monotonic() + 30
    while not future.done():
        if queue.rows("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"):
            return True
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return False


def while_another_holds(queue: Driver, first: Callable[[Any], Any], second: Callable[[], Any]) -> tuple[bool, Any]:
    """Do `second` while a transaction that has done `first` is open; return whether it waited, and what it gave."""
    with ThreadPoolExecutor(1) as pool:
        with queue.database.session() as session:
            first(session)
            future = pool.submit(second)
            waited = waits(queue, future)
        return waited, future.result(30)


def test_finishing_tasks_of_different_readers_waits_for_nobody(queue: Driver) -> None:
    sources = [queue.node(f"source {number}") for number in range(2)]
    readers = [queue.node(f"reader {number}", source) for number, source in enumerate(sources)]
    queue.submit([*sources, *readers, queue.node("last", *readers)])
    tasks = queue.claim(2)
    waited, kept = while_another_holds(
        queue,
        lambda session: finish_tasks(session, [end(queue, tasks[0])]),
        lambda: queue.finish(tasks[1].lease),
    )
    assert (waited, kept) == (False, True)
    assert queue.states(*readers) == ["queued", "queued"]


def test_the_second_of_two_sources_promotes_their_reader(queue: Driver) -> None:
    sources = [queue.node(f"source {number}") for number in range(2)]
    reader = queue.node("reader", *sources)
    queue.submit([*sources, reader, queue.node("last", reader)])
    tasks = queue.claim(2)
    waited, kept = while_another_holds(
        queue,
        lambda session: finish_tasks(session, [end(queue, tasks[0])]),
        lambda: queue.finish(tasks[1].lease),
    )
    assert (waited, kept) == (True, True)
    assert queue.states(reader) == ["queued"]
    (task,) = queue.claim()
    assert task.inputs["sources"] == [queue.digest(source.id) for source in sources]


def twins(queue: Driver) -> tuple[list[Any], list[Any]]:
    """Return two roots of different versions and their readers, which share a key once both roots gave the same."""
    roots = [queue.node("root", version=version) for version in (1, 2)]
    readers = [queue.node("reader", root) for root in roots]
    for root, reader in zip(roots, readers, strict=True):
        queue.submit([root, reader, queue.node(f"after {root.version}", reader)])
    return roots, readers


@pytest.mark.parametrize("first", ["result", "twin"])
def test_a_result_and_the_promotion_of_its_twin_see_each_other(queue: Driver, first: str) -> None:
    roots, readers = twins(queue)
    tasks = {task.lease.task_id: task for task in queue.claim(2)}
    queue.finish(tasks[roots[0].id].lease, "same bytes")
    (reader,) = queue.claim(1)
    assert reader.lease.task_id == readers[0].id
    promoting, recording = end(queue, tasks[roots[1].id], "same bytes"), end(queue, reader)
    one, two = (recording, promoting) if first == "result" else (promoting, recording)

    def finish() -> Any:
        return queue.database.transact(lambda session: finish_tasks(session, [two]))

    waited, kept = while_another_holds(queue, lambda session: finish_tasks(session, [one]), finish)
    assert waited
    assert kept == [two.lease]
    assert queue.states(*readers) == ["succeeded", "succeeded"]


def test_a_finish_waits_for_who_changes_the_graph(queue: Driver) -> None:
    nodes = [queue.node("first"), queue.node("last")]
    queue.submit(nodes)
    task = queue.claim(1)[0]
    waited, kept = while_another_holds(queue, lock_graph, lambda: queue.finish(task.lease))
    assert (waited, kept) == (True, True)


def test_who_waits_for_the_graph_shares_it_no_more(queue: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that share it and wait for it, each would wait for the other."""
    source = queue.node("source")
    queue.submit([source, queue.node("last", source)])
    queue.submit([queue.node("ends a job")])
    ends = [end(queue, task) for task in sorted(queue.claim(2), key=lambda task: task.lease.task_id != source.id)]
    monkeypatch.setattr("orchestrator.db.queue.batches", lambda items: ([each] for each in items))

    def finish() -> Any:
        return queue.database.transact(lambda session: finish_tasks(session, ends))

    with ThreadPoolExecutor(1) as pool:
        with queue.database.session() as session:
            share_graph(session)
            future = pool.submit(finish)
            assert waits(queue, future)
            lock_graph(session)
        assert len(future.result(30)) == 2


def test_jobs_that_end_at_once_leave_no_task_behind_that_both_wanted(queue: Driver) -> None:
    shared, targets = queue.node("shared"), [queue.node(f"target {number}") for number in range(2)]
    for target in targets:
        queue.submit([target, shared], target)
    tasks = [task for task in queue.claim(3) if task.lease.task_id in {target.id for target in targets}]
    waited, kept = while_another_holds(
        queue,
        lambda session: finish_tasks(session, [end(queue, tasks[0])]),
        lambda: queue.finish(tasks[1].lease),
    )
    assert (waited, kept) == (True, True)
    assert queue.states(shared) == ["cancelled"]


def test_renewing_waits_for_no_one_who_finishes_other_tasks(queue: Driver) -> None:
    queue.submit([queue.node(number) for number in range(3)])
    tasks = queue.claim(2)

    def renew() -> Any:
        with queue.database.session() as session:
            return renew_leases(session, [tasks[1].lease], 60.0)

    waited, good = while_another_holds(queue, lambda session: finish_tasks(session, [end(queue, tasks[0])]), renew)
    assert (waited, good) == (False, [tasks[1].lease])


def test_many_finishers_of_one_grid_promote_each_reader_once(queue: Driver) -> None:
    rows = [[queue.node(f"0 {column}") for column in range(24)]]
    for number in range(1, 4):
        rows.append(
            [queue.node(f"{number} {column}", *(rows[-1][column - step] for step in range(3))) for column in range(24)]
        )
    nodes = [node for row in rows for node in row]
    job = queue.submit([*nodes, queue.node("last", *rows[-1])])
    barrier = threading.Barrier(4)

    def work(_: int) -> int:
        barrier.wait()
        done = 0
        claimed: list[Any] = []
        while queue.job(job).state in ("queued", "running"):

            def step(session: Any, ends: list[TaskEnd]) -> tuple[int, list[Any]]:
                kept = len(finish_tasks(session, ends))
                return kept, claim_tasks(session, owner="test", limit=5, lease_seconds=60)

            ends = [end(queue, task) for task in claimed]
            kept, claimed = queue.database.transact(lambda session, ends=ends: step(session, ends))
            done += kept
        return done

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, range(4))) == len(nodes) + 1
    assert queue.job(job).state == "succeeded"
    with queue.database.session(read_only=True) as session:
        log = [(each.task, each.event) for each in events(session, job, limit=10_000)]
    for event in ("promoted", "claimed", "finished"):
        tasks = [task for task, name in log if name == event]
        assert len(tasks) == len(set(tasks)) == len(nodes) + 1


def test_transact_runs_again_what_ran_into_another(queue: Driver) -> None:
    nodes = [queue.node("a"), queue.node("b")]
    queue.submit(nodes)
    both_hold, tries = threading.Barrier(2), []

    def lock(order: list[str]) -> None:
        def work(session: Any) -> None:
            tries.append(order)
            for number, task in enumerate(order):
                session.execute(text("SELECT 1 FROM tasks WHERE id = :id FOR UPDATE"), {"id": task})
                if number == 0 and len(tries) <= 2:
                    both_hold.wait(30)

        queue.database.transact(work)

    ids = [node.id for node in nodes]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lock, [ids, ids[::-1]]))
    assert len(tries) == 3


def test_transact_gives_up_in_the_end(queue: Driver) -> None:
    tries = []

    def work(session: Any) -> None:
        tries.append(session)
        raise ConflictError("two wait for each other")

    with pytest.raises(ConflictError):
        queue.database.transact(work)
    assert len(tries) == 10


def test_a_result_of_another_attempt_beside_a_good_one_is_refused_alone(queue: Driver) -> None:
    node = queue.node("node")
    queue.submit([node, queue.node("other")])
    old = queue.claim(1)[0]
    queue.fail(old.lease, "infrastructure")
    queue.skip_backoff()
    new = queue.claim(1)[0]
    with queue.database.session() as session:
        assert finish_tasks(session, [end(queue, old, "old"), end(queue, new, "new")]) == [new.lease]
        assert finish_task(session, new.lease, {"out": queue.digest("x")}, {}, 1.0) is False
    assert queue.rows("SELECT outputs FROM results")[0]["outputs"] == {"out": queue.digest("new")}
