"""Graphs: streaming in, sharing between jobs, settling what is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, text

from orchestrator.db.queries import cancel_job, create_job, enqueue_graph, find_model, finish_task, retry_job
from orchestrator.db.rows import EnqueueCounts
from orchestrator.db.sql import read_json
from orchestrator.errors import GraphError, NotFoundError
from orchestrator.graph import Resources, TaskNode, TaskRef, inputs_json, task_node
from quant_spec.errors import InvalidInputError

Driver = Any  # the fixture's class lives in conftest.py


def chain(queue: Driver, length: int, *, version: int = 1) -> list[TaskNode]:
    """A root whose code has a version, and tasks that each read the one before."""
    nodes = [queue.node("root", version=version)]
    for number in range(length - 1):
        nodes.append(queue.node(number, nodes[-1]))
    return nodes


def test_enqueue_graph_queues_what_can_run_and_blocks_the_rest(queue: Driver) -> None:
    nodes = chain(queue, 3)
    job = queue.submit(nodes)
    assert queue.counts == EnqueueCounts(total=3, cached=0)
    assert queue.states(*nodes) == ["queued", "blocked", "blocked"]
    row = queue.job(job)
    assert (row.state, row.target_task, row.started_at) == ("queued", nodes[-1].id, None)
    assert re.fullmatch("[0-9a-f]{12}", job)


def test_enqueue_graph_takes_nodes_in_batches_as_they_come(queue: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.db.enqueue._AT_ONCE", 1000)
    stored: list[int] = []

    def planner() -> Iterator[TaskNode]:
        for number in range(2500):
            if number % 500 == 0:
                stored.append(session.scalar(text("SELECT count(*) FROM tasks")))
            yield queue.node(number)

    queue.submit([queue.node("other")])
    with queue.database.session() as session:
        model = find_model(session, "model")
        names = {"recipe_name": "r", "recipe": {}, "recipe_digest": queue.digest("r")}
        job = create_job(session, model=model, **names)
        counts = enqueue_graph(session, job, planner(), queue.node(2499))
    assert counts.total == 2500
    assert stored == [1, 1, 1001, 1001, 2001]


def test_enqueue_graph_takes_repeated_nodes_once(queue: Driver) -> None:
    a = queue.node("a")
    b = queue.node("b", a)
    queue.submit([a, a, b, a, b])
    assert queue.counts.total == 2
    assert queue.work() == ["a", "b"]


@pytest.mark.parametrize("wrong", ["order", "missing", "target", "self"])
def test_enqueue_graph_refuses_a_graph_that_is_not_one(queue: Driver, wrong: str) -> None:
    queue.submit([queue.node("something")])
    before = queue.snapshot()
    a = queue.node("a")
    b = queue.node("b", a)
    nodes, target = {
        "order": ([b, a], b),
        "missing": ([b], b),
        "target": ([a], b),
        "self": ([a, task_node("noop", {}, {"x": [TaskRef("0" * 64, "out")]})], a),
    }[wrong]
    with pytest.raises(GraphError, match="no target" if wrong == "target" else "wanted a task that came before it"):
        queue.submit(nodes, target)
    assert queue.snapshot() == before


def test_enqueue_graph_refuses_an_ended_or_unknown_job(queue: Driver) -> None:
    node = queue.node("node")
    job = queue.submit([node])
    queue.work()
    before = queue.snapshot()
    with pytest.raises(InvalidInputError, match="got state succeeded"), queue.database.session() as session:
        enqueue_graph(session, job, [queue.node("more")], queue.node("more"))
    with pytest.raises(NotFoundError), queue.database.session() as session:
        enqueue_graph(session, "0" * 12, [node], node)
    assert queue.snapshot() == before


def test_a_second_job_computes_nothing_and_ends_at_submission(queue: Driver) -> None:
    nodes = chain(queue, 5)
    queue.submit(nodes)
    queue.work()
    second = queue.submit(nodes)
    assert queue.counts == EnqueueCounts(total=5, cached=5)
    row = queue.job(second)
    assert row.state == "succeeded"
    assert row.created_at <= row.started_at <= row.finished_at
    assert queue.claim() == []


def test_jobs_share_the_tasks_that_they_have_in_common(queue: Driver) -> None:
    shared = chain(queue, 3)
    first, second = [*shared, queue.node("first", shared[-1])], [*shared, queue.node("second", shared[-1])]
    jobs = [queue.submit(first), queue.submit(second)]
    assert queue.counts == EnqueueCounts(total=4, cached=0)
    assert queue.work() == ["root", "0", "1", "first", "second"]
    assert [queue.job(job).state for job in jobs] == ["succeeded", "succeeded"]


def test_a_job_that_joins_a_running_task_has_begun(queue: Driver) -> None:
    shared = queue.node("shared")
    queue.submit([shared])
    lease = queue.take(shared)
    second = queue.submit([shared])
    assert queue.job(second).state == "running"
    assert queue.job(second).started_at is not None
    queue.finish(lease)
    assert queue.job(second).state == "succeeded"


def test_a_new_code_version_that_gives_the_same_bytes_cuts_off_early(queue: Driver) -> None:
    old, new = chain(queue, 40), chain(queue, 40, version=2)
    assert not {node.id for node in old} & {node.id for node in new}
    queue.submit(old)
    while claimed := queue.claim():
        queue.finish(claimed[0].lease, f"bytes of {claimed[0].label}")
    job = queue.submit(new)
    assert queue.counts == EnqueueCounts(total=40, cached=0)
    queue.finish(queue.take(new[0]), "bytes of root")
    # The one transaction that finished the root ended the 39 after it.
    assert queue.job(job).state == "succeeded"
    assert set(queue.states(*new)) == {"succeeded"}
    cached = queue.rows("SELECT task_id FROM job_tasks WHERE job_id = :job AND cached", job=job)
    assert {row["task_id"] for row in cached} == {node.id for node in new[1:]}
    assert queue.task(new[7])["key"] == queue.task(old[7])["key"]


def test_a_new_code_version_that_gives_other_bytes_runs_all_again(queue: Driver) -> None:
    old, new = chain(queue, 4), chain(queue, 4, version=2)
    queue.submit(old)
    queue.work()
    queue.submit(new)
    queue.finish(queue.take(new[0]), "other bytes")
    assert queue.work() == ["0", "1", "2"]


def test_recorded_results_count_at_enqueueing_through_several_levels(queue: Driver) -> None:
    # The new root is recorded under its key already: it is the same task written with a digest for a reference.
    nodes = chain(queue, 3)
    queue.submit(nodes)
    queue.work()
    first = task_node("noop", {"name": 0}, {"data": [queue.digest("data")], "sources": [queue.digest(nodes[0].id)]})
    second = queue.node(1, first)
    assert {first.id, second.id}.isdisjoint(node.id for node in nodes)
    job = queue.submit([first, second])
    assert queue.counts == EnqueueCounts(total=2, cached=2)
    assert queue.job(job).state == "succeeded"


def test_an_output_that_a_source_does_not_give_fails_the_job(queue: Driver) -> None:
    source = queue.node("source")
    reader = task_node("noop", {}, {"x": [TaskRef(source.id, "absent")]})
    other, last = queue.node("other", source), queue.node("last", source)
    job = queue.submit([source, reader, other, last])
    queue.finish(queue.take(source))
    assert queue.states(source, reader, other, last) == ["succeeded", "failed", "cancelled", "cancelled"]
    row = queue.job(job)
    assert row.state == "failed"
    assert row.error == "input of noop: got no output 'absent', wanted one that its source gives"


def test_priority_of_a_shared_task_is_the_highest_of_its_active_jobs(queue: Driver) -> None:
    shared, other = queue.node("shared"), queue.node("other")
    queue.submit([other], priority=3)
    queue.submit([shared], priority=1)
    high = queue.submit([shared], priority=7)
    queue.submit([shared], priority=-2)
    assert queue.task(shared)["priority"] == 7
    with queue.database.session() as session:
        cancel_job(session, high)
    assert queue.task(shared)["priority"] == 1
    assert queue.work() == ["other", "shared"]


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_new_job_revives_tasks_that_ended_without_success(queue: Driver, end: str) -> None:
    nodes = chain(queue, 3)
    first = queue.submit(nodes)
    queue.finish(queue.take(nodes[0]))
    if end == "failed":
        queue.fail(queue.take(nodes[1]), "invalid")
    else:
        with queue.database.session() as session:
            cancel_job(session, first)
    assert queue.states(*nodes) == ["succeeded", end, "cancelled"]
    second = queue.submit(nodes, priority=4)
    assert queue.counts == EnqueueCounts(total=3, cached=1)
    assert queue.states(*nodes) == ["succeeded", "queued", "blocked"]
    row = queue.task(nodes[1])
    assert (row["faults_task"], row["error"], row["finished_at"], row["priority"]) == (0, None, None, 4)
    assert queue.work() == ["0", "1"]
    assert [queue.job(job).state for job in (first, second)] == [end, "succeeded"]


@pytest.mark.parametrize("again", ["submitted", "retried"])
def test_a_job_whose_target_has_succeeded_counts_no_reader_down_again(queue: Driver, again: str) -> None:
    """Its target is read by a task of another job, which waits for something else: that would run without it."""
    target, other = queue.node("target"), queue.node("other")
    reader = queue.node("reader", target, other)
    first = queue.submit([target])
    with queue.database.session() as session:
        cancel_job(session, first)
    second = queue.submit([target, other, reader])
    queue.finish(queue.take(target))
    if again == "submitted":
        first = queue.submit([target])
    else:
        with queue.database.session() as session:
            retry_job(session, first)
    assert queue.job(first).state == "succeeded"
    assert (queue.states(reader), queue.task(reader)["waiting"]) == (["blocked"], 1)
    assert queue.work() == ["other", "reader"]
    assert queue.job(second).state == "succeeded"


def test_a_revived_task_counts_sources_that_finished_while_it_was_cancelled(queue: Driver) -> None:
    a, b = queue.node("a"), queue.node("b")
    both = queue.node("both", a, b)
    first = queue.submit([a, b, both])
    keeper = queue.submit([a])
    with queue.database.session() as session:
        cancel_job(session, first)
    assert queue.states(a, b, both) == ["queued", "cancelled", "cancelled"]
    queue.finish(queue.take(a))
    assert queue.job(keeper).state == "succeeded"
    queue.submit([a, b, both])
    assert queue.task(both)["waiting"] == 1
    assert queue.work() == ["b", "both"]


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
@pytest.mark.parametrize("meanwhile", ["finish", "fail", "cancel"])
def test_what_happens_to_a_shared_task_during_enqueueing_is_seen(queue: Driver, meanwhile: str) -> None:
    """On Postgres others work while a graph streams in. (On SQLite they wait for it.)"""
    shared = queue.node("shared")
    first = queue.submit([shared])
    lease = queue.take(shared)
    reader = queue.node("reader", shared)

    def planner() -> Iterator[TaskNode]:
        yield shared
        for number in range(1500):
            yield queue.node(number)
        # The first batch is stored by now, with `shared` among what the job wants.
        if meanwhile == "finish":
            assert queue.finish(lease)
        elif meanwhile == "fail":
            assert queue.fail(lease, "invalid")
        else:
            with queue.database.session() as other:
                cancel_job(other, first)
        yield reader

    job = queue.submit(planner(), reader)
    assert (
        queue.states(shared, reader)
        == {
            "finish": ["succeeded", "queued"],
            "fail": ["queued", "blocked"],
            "cancel": ["queued", "blocked"],
        }[meanwhile]
    )
    assert queue.job(job).state in ("queued", "running")


def test_jobs_that_are_enqueued_at_once_share_all_tasks(queue: Driver) -> None:
    nodes = [*chain(queue, 30), *(queue.node(f"free {number}") for number in range(30))]
    last = queue.node("last", *nodes)
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: queue.submit([*nodes, last]), range(4)))
    assert queue.rows("SELECT count(*) AS n FROM tasks")[0]["n"] == 61
    assert len(queue.work()) == 61
    assert {queue.job(job).state for job in jobs} == {"succeeded"}


def test_finishing_costs_no_more_statements_when_the_history_is_long(queue: Driver) -> None:
    def statements_of_one_round(name: str) -> int:
        nodes = [queue.node(f"{name} {number}") for number in range(2)]
        queue.submit(nodes)
        count = 0

        def note(*_: Any) -> None:
            nonlocal count
            count += 1

        event.listen(queue.database.engine, "before_cursor_execute", note)
        for node in nodes:
            queue.finish(queue.take(node))
        event.remove(queue.database.engine, "before_cursor_execute", note)
        return count

    few = statements_of_one_round("early")
    for round_ in range(5):
        queue.submit([queue.node(f"{round_} {number}") for number in range(20)])
        queue.work()
    assert statements_of_one_round("late") == few


def test_finishing_reads_no_more_rows_when_statistics_saw_nothing_queued(queue: Driver) -> None:
    """As in a database at rest, in which a large job is enqueued."""
    if queue.database.engine.dialect.name != "postgresql":
        pytest.skip("SQLite keeps no statistics by itself")
    queue.submit([queue.node(number) for number in range(3)])
    queue.work()
    columns = "kind, version, params, inputs, cpus, gpus, memory_bytes, work, label, state, waiting, priority"
    more = "not_before, attempt, faults_task, faults_infrastructure, finished_at, needs"
    queue.execute(
        f"INSERT INTO tasks (id, key, {columns}, {more}) SELECT 'old ' || n, 'old ' || n, {columns}, {more} "
        "FROM tasks CROSS JOIN generate_series(1, 30000) AS s(n) WHERE label = '1'"
    )
    queue.execute(
        "INSERT INTO task_inputs (task_seq, source_seq) SELECT seq, lag(seq) OVER (ORDER BY seq) FROM tasks "
        "ORDER BY seq OFFSET 1"
    )
    queue.execute("ANALYZE")
    queue.submit([queue.node(f"new {number}") for number in range(3_000)])
    # With what this connection did before and has not told the server yet.
    read = text(
        "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables "
        "WHERE relname IN ('tasks', 'task_inputs')"
    )
    # In the end the statement is prepared, with a plan for whatever it is about.
    for task in queue.claim(15):
        with queue.database.session() as session:
            before = session.scalar(read)
            assert finish_task(session, task.lease, {"out": queue.digest("new")}, {}, 1.0)
            assert session.scalar(read) - before < 100  # 9,000 where it reads the queue


def test_values_come_back_as_they_were_planned(queue: Driver) -> None:
    text_with_everything = 'tab\t, line\n, return\r, back\\slash, \\N, "quotes", äöü, \u2028'
    source = queue.node(text_with_everything)
    node = queue.node(["a", None, text_with_everything, 1.5, True], source)
    queue.submit([source, node])
    assert queue.task(source)["label"] == text_with_everything
    stored = {name: read_json(queue.task(node)[name]) for name in ("params", "inputs")}
    assert stored == {"params": dict(node.params), "inputs": inputs_json(node.inputs)}
    assert queue.task(node)["gpu_type"] is None


def test_layers_of_many_sizes_are_few_groups_for_the_claim(queue: Driver) -> None:
    small = [Resources(memory_bytes=(1 << 28) + number) for number in (1, 100, 1 << 20, 1 << 28)]
    large = [Resources(gpu_memory_bytes=(40 << 30) + number * (64 << 20)) for number in range(1, 50)]
    sizes = [*small, *large]
    queue.submit([queue.node(number, resources=each) for number, each in enumerate(sizes)])
    assert len(queue.rows("SELECT DISTINCT needs FROM tasks")) == 2
    assert [row["memory_bytes"] for row in queue.rows("SELECT memory_bytes FROM tasks ORDER BY seq")] == [
        each.memory_bytes for each in sizes
    ]
