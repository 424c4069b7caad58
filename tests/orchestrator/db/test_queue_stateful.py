"""The queue under any sequence of events: a machine that does everything in every order and checks what must hold.

Deterministic tasks: an output's digest is a function of the task's key, so a result that was computed twice, or mixed
up, shows. After every step the tables are checked against the rules of the queue; at the end everything is worked
off, and every job that was not cancelled and did not fail must have succeeded.
"""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from orchestrator.db.models import Base
from orchestrator.db.queries import (
    cancel_job,
    fail_task,
    finish_task,
    finish_tasks,
    reap_expired,
    release_task,
    renew_leases,
    retry_job,
)
from orchestrator.db.rows import ClaimedTask, TaskEnd
from orchestrator.graph import TaskNode, TaskRef, task_node
from quant_spec.keys import task_key

Driver = Any  # the fixture's class lives in conftest.py


def pool() -> list[TaskNode]:
    """Return tasks that jobs draw from: two versions of two roots, and readers over them; sources come first."""
    nodes = [task_node("noop", {"root": name}, {}, version=version) for name in range(2) for version in (1, 2)]
    for number, sources in enumerate([(0,), (1,), (0, 2), (1, 3), (4, 6), (5, 7), (4, 2), (8, 9)]):
        refs = [TaskRef(nodes[source].id, "out") for source in sources]
        # Readers of two versions of the same things have one name, so they share a key when the bytes are the same.
        nodes.append(task_node("noop", {"reader": number // 2}, {"x": refs}))
    return nodes


POOL = pool()


def closure(target: TaskNode) -> list[TaskNode]:
    """Return a task and all that it needs, sources first."""
    wanted = {target.id}
    for node in reversed(POOL):
        if node.id in wanted:
            wanted |= node.sources()
    return [node for node in POOL if node.id in wanted]


def output(task: ClaimedTask) -> str:
    """Return the digest of what a task computes: that of its params and inputs; versions give the same bytes."""
    return hashlib.sha256(repr((task.params, task.inputs)).encode()).hexdigest()


class QueueMachine(RuleBasedStateMachine):
    """Everything that can happen to a queue."""

    queue: Driver

    leased = Bundle("leased")
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        tables = reversed(Base.metadata.sorted_tables)
        with self.queue.database.session() as session:
            session.execute(text("UPDATE jobs SET target_task = NULL"))
            for table in tables:
                session.execute(table.delete())
        self.attempts: dict[str, int] = {}
        self.computed: dict[str, str] = {}
        self.done: set[str] = set()

    @rule(target=jobs, node=st.sampled_from(POOL), priority=st.integers(-1, 1))
    def submit(self, node: TaskNode, priority: int) -> str:
        job: str = self.queue.submit(closure(node), priority=priority)
        return job

    @rule(target=leased, limit=st.integers(1, 4))
    def claim(self, limit: int) -> Any:
        claimed = self.queue.claim(limit)
        for task in claimed:
            assert task.lease.attempt > self.attempts.get(task.lease.task_id, 0)
            self.attempts[task.lease.task_id] = task.lease.attempt
            assert task_key(task.kind, task.version, task.params, task.inputs) not in self.computed
        return multiple(*claimed)

    def good(self, task: ClaimedTask) -> bool:
        where = "id = :id AND state = 'running' AND attempt = :attempt AND lease_token = :token AND lease_until > 1"
        lease = {"id": task.lease.task_id, "attempt": task.lease.attempt, "token": task.lease.token}
        return bool(self.queue.rows(f"SELECT 1 FROM tasks WHERE {where}", **lease))

    @rule(task=leased)
    def finish(self, task: ClaimedTask) -> None:
        good = self.good(task)
        digest = output(task)
        with self.queue.database.session() as session:
            assert finish_task(session, task.lease, {"out": digest}, {}, 1.0) == good
        if good:
            key = task_key(task.kind, task.version, task.params, task.inputs)
            assert key not in self.computed, "the same key was computed twice"
            self.computed[key] = digest

    @rule(tasks=st.lists(leased, min_size=2, max_size=4, unique_by=lambda task: task.lease))
    def finish_together(self, tasks: list[ClaimedTask]) -> None:
        good = [task for task in tasks if self.good(task)]
        ends = [TaskEnd(task.lease, {"out": output(task)}, {}, 1.0) for task in tasks]
        kept = self.queue.database.transact(lambda session: finish_tasks(session, ends))
        assert kept == [task.lease for task in good]
        for task in good:
            key = task_key(task.kind, task.version, task.params, task.inputs)
            assert key not in self.computed, "the same key was computed twice"
            self.computed[key] = output(task)

    @rule(task=leased, fault=st.sampled_from(["task", "infrastructure", "infrastructure", "invalid"]))
    def fail(self, task: ClaimedTask, fault: str) -> None:
        good = self.good(task)
        assert self.queue.fail(task.lease, fault) == good

    @rule(task=leased)
    def meet_a_lost_blob(self, task: ClaimedTask) -> None:
        good = self.good(task)
        blobs = [digest for digests in task.inputs.values() for digest in digests]
        if not blobs:
            return
        with self.queue.database.session() as session:
            assert fail_task(session, task.lease, fault="lost", error="lost", lost=blobs[:1]) == good
        # What was withdrawn is computed again, and its task no success until then.
        results = {row["key"] for row in self.queue.rows("SELECT key FROM results")}
        assert all(digest in blobs[:1] for key, digest in self.computed.items() if key not in results)
        self.computed = {key: digest for key, digest in self.computed.items() if key in results}
        self.done &= {row["id"] for row in self.queue.rows("SELECT id FROM tasks WHERE state = 'succeeded'")}

    @rule(task=leased)
    def release(self, task: ClaimedTask) -> None:
        good = self.good(task)
        with self.queue.database.session() as session:
            assert release_task(session, task.lease) == good

    @rule(task=leased)
    def renew(self, task: ClaimedTask) -> None:
        good = self.good(task)
        with self.queue.database.session() as session:
            assert renew_leases(session, [task.lease], 60) == ([task.lease] if good else [])

    @rule(task=consumes(leased))
    def lose(self, task: ClaimedTask) -> None:
        if self.good(task):
            self.queue.expire(task.lease)

    @rule()
    def reap(self) -> None:
        late = {row["id"] for row in self.queue.rows("SELECT id FROM tasks WHERE lease_until = 1")}
        with self.queue.database.session() as session:
            assert set(reap_expired(session)) == late

    @rule()
    def wait(self) -> None:
        self.queue.skip_backoff()

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        active = self.queue.job(job).state in ("queued", "running")
        with self.queue.database.session() as session:
            assert cancel_job(session, job) == active

    @rule(job=jobs)
    def retry(self, job: str) -> None:
        if self.queue.job(job).state in ("failed", "cancelled"):
            with self.queue.database.session() as session:
                retry_job(session, job)

    @rule(task=leased)
    def crash_before_commit(self, task: ClaimedTask) -> None:
        before = self.queue.snapshot()
        self.queue.database.commit_hook = lambda stage: 1 // 0
        try:
            self.queue.finish(task.lease)
        except ZeroDivisionError:
            pass
        finally:
            self.queue.database.commit_hook = None
        assert self.queue.snapshot() == before

    @invariant()
    def rules_hold(self) -> None:
        for name, statement in RULES.items():
            assert self.queue.rows(statement) == [], name
        succeeded = {row["id"] for row in self.queue.rows("SELECT id FROM tasks WHERE state = 'succeeded'")}
        assert self.done <= succeeded, "a success was taken back"
        self.done = succeeded

    def teardown(self) -> None:
        """Whatever happened: work goes on to the end."""
        self.queue.execute("UPDATE tasks SET lease_until = 1 WHERE state = 'running'")
        with self.queue.database.session() as session:
            reap_expired(session)
        while True:
            self.queue.skip_backoff()
            claimed = self.queue.claim(10)
            if not claimed:
                break
            for task in claimed:
                with self.queue.database.session() as session:
                    assert finish_task(session, task.lease, {"out": output(task)}, {}, 1.0)
        self.rules_hold()
        states = {row["state"] for row in self.queue.rows("SELECT state FROM jobs")}
        assert states <= {"succeeded", "failed", "cancelled"}


ACTIVE = "('queued', 'running')"
WANTING = (
    "SELECT 1 FROM job_tasks JOIN jobs ON jobs.id = job_tasks.job_id "
    f"WHERE job_tasks.task_id = tasks.id AND jobs.state IN {ACTIVE}"
)
UNDONE = (
    "(SELECT count(*) FROM task_inputs JOIN tasks source ON source.seq = task_inputs.source_seq "
    "WHERE task_inputs.task_seq = tasks.seq AND source.state <> 'succeeded')"
)

#: What must hold between transactions, each as a query for what breaks it.
RULES = {
    "an unfinished task is wanted": (
        f"SELECT id FROM tasks WHERE state IN ('blocked', 'queued', 'running') AND NOT EXISTS ({WANTING})"
    ),
    "an active job has no dead task": (
        f"SELECT id FROM tasks WHERE state IN ('failed', 'cancelled') AND EXISTS ({WANTING})"
    ),
    "a blocked task waits for what has not succeeded, and for something": (
        f"SELECT id FROM tasks WHERE state = 'blocked' AND (waiting = 0 OR waiting <> {UNDONE})"
    ),
    # One that runs or has run keeps what it read, also when that was lost afterwards.
    "only a task with all inputs goes on": f"SELECT id FROM tasks WHERE state = 'queued' AND {UNDONE} > 0",
    "a success has a result": (
        "SELECT id FROM tasks WHERE state = 'succeeded' AND NOT EXISTS (SELECT 1 FROM results WHERE key = tasks.key)"
    ),
    "nothing recorded is computed again": (
        "SELECT id FROM tasks WHERE state IN ('queued', 'running') AND key IN (SELECT key FROM results)"
    ),
    "a job succeeds with its target": (
        "SELECT jobs.id FROM jobs JOIN tasks ON tasks.id = jobs.target_task "
        f"WHERE (jobs.state = 'succeeded' AND tasks.state <> 'succeeded' AND tasks.repairs = 0) "
        f"OR (jobs.state IN {ACTIVE} AND tasks.state = 'succeeded')"
    ),
    "the priority of an unfinished task is its jobs' highest": (
        "SELECT id FROM tasks WHERE state IN ('blocked', 'queued', 'running') AND priority <> "
        "(SELECT max(jobs.priority) FROM job_tasks JOIN jobs ON jobs.id = job_tasks.job_id "
        f"WHERE job_tasks.task_id = tasks.id AND jobs.state IN {ACTIVE})"
    ),
    "a job runs while one of its tasks does": (
        "SELECT jobs.id FROM jobs JOIN job_tasks ON job_tasks.job_id = jobs.id "
        "JOIN tasks ON tasks.id = job_tasks.task_id WHERE jobs.state = 'queued' AND tasks.state = 'running'"
    ),
}


def test_the_queue_keeps_its_rules_whatever_happens(queue: Driver) -> None:
    machine = type("Machine", (QueueMachine,), {"queue": queue})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
