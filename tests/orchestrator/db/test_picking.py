"""Claiming by placement: what a picker is shown, what tasks have from their jobs, what a fault of memory changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orchestrator.db.queries import add_model, claim_tasks, create_job, enqueue_graph
from orchestrator.db.queue import fail_task
from orchestrator.db.rows import Candidate, ClaimedTask, ModelRow
from orchestrator.db.session import Database
from orchestrator.graph import Resources, TaskNode
from orchestrator.scheduling.picker import Places
from tests.orchestrator.db.conftest import QueueDriver
from workers.execution.cluster import Node

GIB = 2**30
ON_GPU = Resources(gpu_memory_bytes=30 * GIB)


def node(name: str, cpus: float = 4.0, gpus: int = 0, gpu_type: str | None = None) -> Node:
    """Return a node whose GPUs have 40 GiB."""
    return Node(name, name, cpus, 64 * GIB, gpus, 40 * GIB, gpu_type, cuda_ok=True)


def places(*nodes: Node) -> Places:
    """Return a cluster on which nothing runs."""
    found = Places(1.0)
    found.look(nodes)
    return found


def claim(queue: QueueDriver, cluster: Places, limit: int = 64) -> dict[str, ClaimedTask]:
    """Claim what a cluster has room for; by label."""
    picker = cluster.picker(limit)
    with queue.database.session() as session:
        claimed = claim_tasks(session, owner="test", limit=limit, lease_seconds=60.0, picker=picker)
    cluster.running |= {task.lease.task_id: picker.placements[task.lease.task_id] for task in claimed}
    return {task.label: task for task in claimed}


def submit(
    queue: QueueDriver, nodes: Sequence[TaskNode], recipe: Mapping[str, Any] | None = None, **wishes: Any
) -> str:
    """Make a job that wants something of devices."""
    names = {"recipe_name": "r", "recipe": dict(recipe or {}), "recipe_digest": queue.digest("r")}
    with queue.database.session() as session:
        model = add_model(session, ModelRow("model", queue.digest("model"), "UNet2DModel", "here", 10, 5, {}))
        job = create_job(session, model=model, **names, **wishes)
        last = queue.node(f"last of {nodes[0].label}", *nodes)
        enqueue_graph(session, job, [*nodes, last], last)
    return job


def task_rows(queue: QueueDriver) -> dict[str, dict[str, Any]]:
    """Return the tasks' rows by label."""
    return {row["label"]: row for row in queue.rows("SELECT * FROM tasks")}


def test_tasks_have_what_their_job_says(queue: QueueDriver) -> None:
    nodes = [queue.node("gains", resources=ON_GPU), queue.node("does not")]
    recipe = {"deterministic": True, "resources": {"task_minutes": 2.5}}
    submit(queue, nodes, recipe, device="cuda", gpu_type="H100")
    rows = task_rows(queue)
    gains, other = rows["gains"], rows["does not"]
    assert (gains["device"], gains["gpu_type"], gains["gpus"], gains["gpu_memory_bytes"]) == (
        "cuda",
        "H100",
        1.0,
        30 * GIB,
    )
    assert (gains["deadline_seconds"], bool(gains["deterministic"])) == (150.0, True)
    assert (other["gpus"], other["gpu_memory_bytes"]) == (0.0, 0)


def test_task_of_two_jobs_runs_where_either_lets_it(queue: QueueDriver) -> None:
    nodes = [queue.node("a", resources=ON_GPU), queue.node("b", resources=ON_GPU)]
    submit(queue, nodes, device="cuda")
    submit(queue, nodes[:1], device="cpu")
    rows = task_rows(queue)
    assert (rows["a"]["device"], rows["a"]["gpus"]) == ("auto", 0.0)
    assert (rows["b"]["device"], rows["b"]["gpus"]) == ("cuda", 1.0)


def test_claimed_tasks_know_their_node(queue: QueueDriver) -> None:
    submit(queue, [queue.node("g", resources=ON_GPU), queue.node("c")])
    cluster = places(node("plain"), node("gpu", gpus=1, gpu_type="A100"))
    assert set(claim(queue, cluster)) == {"g", "c"}
    rows = task_rows(queue)
    assert (rows["g"]["ran_on"], rows["c"]["ran_on"]) == ("gpu", "plain")


def test_cluster_without_the_gpu_passes_over_what_must_have_it(queue: QueueDriver) -> None:
    """Also where more of it stand in front than are looked at."""
    submit(queue, [queue.node(number, resources=ON_GPU) for number in range(9)], device="cuda", gpu_type="H100")
    submit(queue, [queue.node("behind")])
    assert set(claim(queue, places(node("plain")), limit=4)) == {"behind"}
    submit(queue, [queue.node("again")])
    assert set(claim(queue, places(node("other", gpus=1, gpu_type="A100")), limit=4)) == {"again"}
    assert len(claim(queue, places(node("right", gpus=1, gpu_type="H100")), limit=4)) == 1


def test_room_is_filled_from_behind_what_waits_for_a_gpu(queue: QueueDriver) -> None:
    submit(queue, [queue.node(number, resources=ON_GPU) for number in range(9)], device="cuda")
    submit(queue, [queue.node("behind")])
    assert set(claim(queue, places(node("a", gpus=1)), limit=4)) == {"0", "behind"}


def test_first_that_does_not_fit_is_not_overtaken(queue: QueueDriver) -> None:
    submit(queue, [queue.node("small")])
    cluster = places(node("a", 2.0))
    assert set(claim(queue, cluster)) == {"small"}
    submit(queue, [queue.node("wide", resources=Resources(cpus=2.0))], priority=100)
    submit(queue, [queue.node("next")])
    assert claim(queue, cluster) == {}
    cluster.end(next(iter(cluster.running)))
    assert set(claim(queue, cluster)) == {"wide"}


def test_memory_that_ran_out_is_infrastructure_and_makes_the_task_alone(queue: QueueDriver) -> None:
    submit(queue, [queue.node("reference", kind="reference", resources=ON_GPU), queue.node("noop", resources=ON_GPU)])
    submit(queue, [queue.node("det", kind="reference", resources=ON_GPU)], {"deterministic": True})
    cluster = places(node("a", 8.0, gpus=3, gpu_type="A100"))
    for task in claim(queue, cluster).values():
        with queue.database.session() as session:
            assert fail_task(session, task.lease, fault="memory", error="CUDA out of memory")
    rows = task_rows(queue)
    assert {name: rows[name]["batch_divisor"] for name in ("reference", "noop", "det")} == {
        "reference": 2,
        "noop": 1,  # there is no batch that is free
        "det": 1,  # its bytes are to be the same
    }
    assert all(rows[name]["alone"] for name in ("reference", "noop", "det"))
    assert all(
        (rows[n]["faults_infrastructure"], rows[n]["faults_task"]) == (1, 0) for n in ("reference", "noop", "det")
    )


def test_deterministic_job_is_bound_to_the_type_of_its_first_task(queue: QueueDriver) -> None:
    nodes = [queue.node(name, resources=ON_GPU) for name in "xyz"]
    job = submit(queue, nodes, {"deterministic": True})
    cluster = places(node("a", gpus=1, gpu_type="A100"), node("h", gpus=2, gpu_type="H100"))
    assert set(claim(queue, cluster)) == {"x"}
    row = queue.job(job)
    assert (row.device, row.gpu_type) == ("cuda", "A100")
    assert claim(queue, cluster) == {}
    cluster.end(next(iter(cluster.running)))
    assert set(claim(queue, cluster)) == {"y"}
    assert [each.gpu_type for each in cluster.running.values()] == ["A100"]


@pytest.mark.parametrize("backend", [pytest.param("postgres", marks=pytest.mark.postgres)])
def test_two_orchestrators_do_not_bind_a_job_to_two_types(queue: QueueDriver, database: Database) -> None:
    job = submit(queue, [queue.node(name, resources=ON_GPU) for name in "xy"], {"deterministic": True})
    first, second = places(node("a", gpus=1, gpu_type="A100")), places(node("h", gpus=1, gpu_type="H100"))
    with database.session() as session:
        assert len(claim_tasks(session, owner="1", limit=1, lease_seconds=60.0, picker=first.picker(1))) == 1
        assert claim(queue, second) == {}
    assert claim(queue, second) == {}
    assert queue.job(job).gpu_type == "A100"


def test_candidates_tell_whether_their_kind_can_be_spread() -> None:
    assert Candidate("i", "k", "calibrate", ON_GPU).shards
    assert not Candidate("i", "k", "distill", ON_GPU).shards
    assert not Candidate("i", "k", "unknown", ON_GPU).shards
