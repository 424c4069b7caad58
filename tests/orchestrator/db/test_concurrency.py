"""Several orchestrators and submitters at once: no deadlock, nothing lost, nothing computed twice."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orchestrator.db.queries import cancel_job, renew_leases, work_left
from orchestrator.graph import TaskNode

Driver = Any  # the fixture's class lives in conftest.py


def graph_of_layers(queue: Driver) -> tuple[list[TaskNode], list[TaskNode]]:
    """Return five rows of tasks that read each other, and four targets over the last."""
    layers = [[queue.node(f"0 {column}") for column in range(6)]]
    for row in range(1, 5):
        layers.append([queue.node(f"{row} {column}", *layers[-1][column : column + 2]) for column in range(6)])
    targets = [queue.node(f"target {column}", *layers[-1][column : column + 3]) for column in range(4)]
    return [node for layer in layers for node in layer], targets


def idle(queue: Driver) -> bool:
    with queue.database.session(read_only=True) as session:
        return not work_left(session)


def test_many_orchestrators_and_submitters_at_once(queue: Driver) -> None:
    graph, targets = graph_of_layers(queue)
    keeper = queue.submit([*graph, targets[0]])
    submitted = threading.Event()
    finished: list[str] = []

    def submit(column: int) -> list[str]:
        jobs = []
        for priority in range(4):
            jobs.append(queue.submit([*graph, targets[column]], priority=priority))
            if priority % 2:
                with queue.database.session() as session:
                    cancel_job(session, jobs.pop())
        return jobs

    def orchestrate(seed: int) -> None:
        dice = random.Random(seed)
        while True:
            claimed = queue.claim(3)
            if not claimed and submitted.is_set() and idle(queue):
                return
            with queue.database.session() as session:
                renew_leases(session, [task.lease for task in claimed], 60)
            for task in claimed:
                if dice.random() < 0.1:
                    queue.fail(task.lease, "infrastructure")
                elif queue.finish(task.lease):
                    finished.append(task.lease.task_id)
            queue.skip_backoff()

    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(orchestrate, seed) for seed in range(3)]
        jobs = [job for each in pool.map(submit, range(1, 4)) for job in each]
        submitted.set()
        for worker in workers:
            worker.result()
    assert {queue.job(job).state for job in [keeper, *jobs]} == {"succeeded"}
    assert len(finished) == len(set(finished)) == len(graph) + len(targets)
