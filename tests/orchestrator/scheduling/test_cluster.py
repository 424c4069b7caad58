"""A cluster of real raylets, whose GPUs are logical: what is placed where, refused, retried and moved.

The head has CPUs alone; `a` has two GPUs of 40 GiB, `h` one of 80 GiB; `old` has another version of Quantmill.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.actions.jobs import show_job
from orchestrator.cli.jobs import job_text
from orchestrator.db.queries import list_tasks
from orchestrator.db.session import Database
from orchestrator.graph import Resources, TaskNode, task_node
from orchestrator.scheduling.picker import Places
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.service import Service
from orchestrator.settings import resolve_settings
from quant_spec.kinds import KINDS
from tests import drill
from tests.orchestrator.scheduling.test_scheduler import Borrowed, in_thread, job_row, noop, rows, submit, until
from workers.errors import Fault, fault_of
from workers.execution.cluster import LOGICAL_GPU_GIB, own_versions
from workers.execution.executor import RayExecutor
from workers.execution.local import python_path
from workers.storage.store import open_store

pytestmark = pytest.mark.ray

GIB = 2**30
#: Python runs it at the start of every process that finds it.
SITE = "from quant_spec.kinds import KINDS\nfrom tests.drill import KIND\nKINDS['drill'] = KIND\n"


class Raylets:
    """The cluster and the executor that drives it."""

    def __init__(self, cluster: Any, nodes: dict[str, Any]) -> None:
        self.cluster, self.nodes = cluster, nodes
        self.executor = RayExecutor.start(cluster.address)

    def host(self, name: str) -> str:
        """Return what a node is called."""
        return next(each.host for each in self.executor.capacity().nodes if each.id == self.nodes[name].node_id)


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raylets]:
    """Four nodes, for all tests of this file; the last one kills one of them."""
    from ray.cluster_utils import Cluster

    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    old = tmp_path_factory.mktemp("old")
    (old / "quantmill-1.2.dist-info").mkdir()
    (old / "quantmill-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: quantmill\nVersion: 1.2\n")
    environment = {
        "PYTHONPATH": f"{python_path()}{os.pathsep}{site}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    # As `workers.execution.remote` starts it, without what nothing uses.
    small = {"object_store_memory": 80 << 20, "include_log_monitor": False}
    with (
        pytest.MonkeyPatch.context() as patch,
        # A socket's path may have 107 characters at most, so not below pytest's folder.
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        (Path(folder) / "ray").mkdir()
        patch.setenv("RAY_TMPDIR", folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(KINDS, "drill", drill.KIND)
        head = {"num_cpus": 2, "memory": 4 * GIB, "include_dashboard": False, "no_monitor": True, **small}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        nodes = {"head": cluster.head_node}
        shapes: dict[str, dict[str, Any]] = {
            "a": {"num_cpus": 8, "num_gpus": 2, "labels": {"ray.io/accelerator-type": "A100"}, "gib": "40"},
            "h": {"num_cpus": 2, "num_gpus": 1, "labels": {"ray.io/accelerator-type": "H100"}, "gib": "80"},
            "old": {"num_cpus": 8, "path": f"{old}{os.pathsep}{environment['PYTHONPATH']}"},
        }
        for name, shape in shapes.items():
            own = {LOGICAL_GPU_GIB: shape.pop("gib", ""), "PYTHONPATH": shape.pop("path", environment["PYTHONPATH"])}
            for variable, value in own.items():
                patch.setenv(variable, value)
            nodes[name] = cluster.add_node(memory=16 * GIB, **small, **shape)
        patch.delenv(LOGICAL_GPU_GIB)
        patch.setenv("PYTHONPATH", environment["PYTHONPATH"])
        made = Raylets(cluster, nodes)
        until(lambda: len(made.executor.capacity().nodes) == 4)
        yield made
        made.executor.shutdown()
        cluster.shutdown()


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Service:
    """The database with a store of its own."""
    settings = resolve_settings({}, home=str(tmp_path))
    (tmp_path / "store").mkdir()
    return Service(settings, database, open_store(settings.store_url))


@pytest.fixture
def scheduler(raylets: Raylets, service: Service) -> Scheduler:
    """A scheduler on the cluster."""
    config = SchedulerConfig(
        service.settings.store_url, service.settings.cache_dir, lease_seconds=5.0, poll_seconds=0.1
    )
    return Scheduler(service.database, lambda: Borrowed(raylets.executor), config)


@pytest.fixture
def backend() -> str:
    """What the database is makes no difference here."""
    return "sqlite"


def on_gpu(name: str, gib: float, **params: Any) -> TaskNode:
    """Plan a task that gains by a GPU."""
    told = drill.Params(name=name, **params).to_json()
    resources = Resources(gpu_memory_bytes=int(gib * GIB), memory_bytes=GIB // 4)
    return task_node("drill", told, {}, resources=resources, label=name)


def places(service: Service, job: str) -> dict[str, tuple[str, str]]:
    """Return node and device of a job's tasks by label, as `jobs show` has them."""
    return {task["label"]: (task["node"], task["device"]) for task in show_job(service, job)["ran"]}


def test_cluster_is_known_node_by_node(raylets: Raylets) -> None:
    found = {each.id: each for each in raylets.executor.capacity().nodes}
    a, h, old, head = (found[raylets.nodes[name].node_id] for name in ("a", "h", "old", "head"))
    assert (a.cpus, a.gpus, a.gpu_memory_bytes, a.gpu_type, a.cuda_ok) == (8.0, 2, 40 * GIB, "A100", True)
    assert (h.cpus, h.gpus, h.gpu_memory_bytes, h.gpu_type) == (2.0, 1, 80 * GIB, "H100")
    assert (head.cpus, head.gpus, head.memory_bytes) == (2.0, 0, 4 * GIB)
    assert a.versions == h.versions == head.versions == own_versions()
    assert len({each.host for each in found.values()}) == 4
    assert old.versions["quantmill"] == "1.2"
    known = Places(2.0)
    known.look(tuple(found.values()))
    assert known.left_out.keys() == {old.host}
    wanted = own_versions()["quantmill"]
    assert known.left_out[old.host].endswith(f"got quantmill 1.2, wanted quantmill {wanted}, as the orchestrator has")


def test_tasks_run_where_they_are_placed(raylets: Raylets, service: Service, scheduler: Scheduler) -> None:
    nodes = [
        *(on_gpu(f"quarter {number}", 10) for number in range(3)),
        on_gpu("most of 40", 30),
        on_gpu("too large for 40", 60),
        noop("no gain", resources=Resources(memory_bytes=GIB)),
    ]
    job = submit(service.database, [*nodes, noop("last", *nodes)])
    scheduler.run(drain=True)
    assert job_row(service.database, job).state == "succeeded"
    found = places(service, job)
    a, h = raylets.host("a"), raylets.host("h")
    assert [found[f"quarter {number}"] for number in range(3)] == [(a, "A100")] * 3
    assert found["most of 40"] == (a, "A100")
    assert found["too large for 40"] == (h, "H100")
    assert found["no gain"][0] not in (raylets.host("old"), a, h)
    assert found["no gain"][1] == "cpu"
    text = job_text(show_job(service, job))
    assert f"ran on    {h} H100: 1 drill" in text
    with service.database.session(read_only=True) as session:
        ran = [task.ran for task in list_tasks(session, job)]
    assert all(each["versions"] == own_versions() and each["peak_rss_bytes"] > 0 for each in ran if each)
    timings = rows(service.database, "SELECT device, n FROM kind_timings WHERE kind = 'drill' ORDER BY device")
    assert timings == [{"device": "A100", "n": 4}, {"device": "H100", "n": 1}]
    finished = rows(service.database, "SELECT data FROM events WHERE event = 'finished'")
    assert all('"device"' in each["data"] and '"peak_gpu_bytes"' in each["data"] for each in finished)


def test_out_of_memory_is_tried_again_alone_with_smaller_batches(service: Service, scheduler: Scheduler) -> None:
    node = on_gpu("greedy", 5, batch_size=8, fits=2)
    job = submit(service.database, [node])
    scheduler.run(drain=True)
    assert job_row(service.database, job).state == "succeeded"
    row = rows(service.database, "SELECT * FROM tasks WHERE kind = 'drill'")[0]
    assert (bool(row["alone"]), row["batch_divisor"], row["attempt"]) == (True, 4, 3)
    assert (row["faults_task"], row["faults_infrastructure"]) == (0, 2)
    with service.database.session(read_only=True) as session:
        task = list_tasks(session, job)[0]
    assert task.metrics is not None
    assert task.metrics["batch"] == 2
    retried = rows(service.database, "SELECT data FROM events WHERE event = 'retried'")
    assert len(retried) == 2
    assert all(
        '"memory"' in each["data"] and "OutOfMemoryError: CUDA out of memory" in each["data"] for each in retried
    )


def test_memory_that_rays_own_watch_found_used_up_is_a_fault_of_memory() -> None:
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    assert fault_of(OutOfMemoryError("Task was killed due to the node running low on memory.")) is Fault.MEMORY
    assert fault_of(WorkerCrashedError()) is Fault.TASK


@pytest.mark.slow  # from the command line: tests/orchestrator/cli/test_devices.py
def test_deterministic_job_stays_on_one_type(raylets: Raylets, service: Service, scheduler: Scheduler) -> None:
    nodes = [on_gpu(f"task {number}", 30) for number in range(3)]
    job = submit(service.database, [*nodes, noop("last", *nodes)], asked={"deterministic": True})
    scheduler.run(drain=True)
    found = places(service, job)
    assert {found[node.label][1] for node in nodes} == {"A100"}
    row = job_row(service.database, job)
    assert (row.device, row.gpu_type) == ("cuda", "A100")


def test_tasks_of_a_killed_node_run_elsewhere(
    raylets: Raylets, service: Service, scheduler: Scheduler, tmp_path: Path
) -> None:
    """The last test of this file, as the node stays dead."""
    gate = tmp_path / "gate"
    node = on_gpu("moved", 10, until=str(gate))
    job = submit(service.database, [node])
    a, h = raylets.host("a"), raylets.host("h")
    thread = in_thread(lambda: scheduler.run(drain=True))

    def is_on(host: str) -> Callable[[], bool]:
        return lambda: rows(service.database, "SELECT ran_on FROM tasks")[0]["ran_on"] == host

    until(is_on(a))
    raylets.cluster.remove_node(raylets.nodes["a"], allow_graceful=False)
    until(is_on(h))
    gate.touch()
    thread.join(300)
    assert not thread.is_alive()
    assert job_row(service.database, job).state == "succeeded"
    assert places(service, job)["moved"] == (h, "H100")
    until(lambda: len(raylets.executor.capacity().nodes) == 3)
    after = submit(service.database, [on_gpu("after", 10)])
    rest = Scheduler(service.database, lambda: Borrowed(raylets.executor), scheduler._config)
    rest.run(drain=True)
    assert places(service, after)["after"] == (h, "H100")
