"""Ray as an executor: real processes, killed for real."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.processes import gone
from workers.errors import ExecutorError, Fault
from workers.execution.execute import TaskCall, execute_call
from workers.execution.executor import Finished, RayExecutor
from workers.execution.local import python_path
from workers.storage.store import NodeStore

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def shared() -> Iterator[RayExecutor]:
    """A local Ray that no test harms, started where files are open to everybody unless somebody sees to it."""
    before = os.umask(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTMILL_DB", "postgresql://me:hush@host/name")
        executor = RayExecutor.start(cpus=2, memory_bytes=2 << 30)
    os.umask(before)
    yield executor
    executor.shutdown()


@pytest.fixture
def call(folder_store: NodeStore, tmp_path: Path) -> TaskCall:
    """A call of the kind that does nothing."""
    return TaskCall("noop", {"payload": 1}, {}, folder_store.url, str(tmp_path / "cache"))


def collect(executor: RayExecutor, count: int, seconds: float = 180.0) -> dict[int, Finished]:
    """Wait for so many calls to end."""
    ended: dict[int, Finished] = {}
    deadline = time.monotonic() + seconds
    while len(ended) < count and time.monotonic() < deadline:
        ended |= {each.handle: each for each in executor.wait(0.5)}
    assert len(ended) == count
    return ended


def family(executor: RayExecutor) -> list[psutil.Process]:
    """Return the driver's process and all below it."""
    driver = psutil.Process(executor._process.pid)
    return [driver, *driver.children(recursive=True)]


def running(executor: RayExecutor) -> list[psutil.Process]:
    """Return the workers that are in the middle of a task."""
    return [process for process in family(executor) if process.name() == "ray::noop"]


def until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_calls_give_what_they_give_in_this_process(shared: RayExecutor, call: TaskCall) -> None:
    calls = [replace(call, params={"payload": number}) for number in range(20)]
    handles = {shared.submit(each): each for each in calls}
    ended = collect(shared, 20)
    for handle, each in handles.items():
        output = ended[handle].output
        assert output is not None
        assert output.outputs == execute_call(each).outputs
        assert output.metrics["seconds"] >= 0


def test_capacity_is_what_was_asked_for(shared: RayExecutor) -> None:
    capacity = shared.capacity()
    assert (capacity.cpus, capacity.gpus, capacity.memory_bytes) == (2.0, 0.0, 2 << 30)


def test_a_local_ray_has_no_part_that_nothing_uses(shared: RayExecutor) -> None:
    words = [word for each in family(shared) for word in each.cmdline()]
    assert any(word.endswith("/raylet") for word in words)
    assert not [word for word in words if word.endswith(("/monitor.py", "/log_monitor.py", "/dashboard.py"))]


def test_errors_of_a_body_have_their_fault_and_one_line(shared: RayExecutor, call: TaskCall, tmp_path: Path) -> None:
    handles = [
        shared.submit(replace(call, params={"seconds": 1e300})),  # more than a clock can count
        shared.submit(replace(call, kind="nope")),
        shared.submit(replace(call, version=7)),
        shared.submit(replace(call, store_url=str(tmp_path / "gone"))),
    ]
    ended = collect(shared, 4)
    faults = [ended[handle].fault for handle in handles]
    assert faults == [Fault.TASK, Fault.INVALID, Fault.INVALID, Fault.OUTAGE]
    assert ended[handles[0]].error.startswith("OverflowError: ")
    assert all("\n" not in each.error and each.output is None for each in ended.values())


def test_call_that_asks_for_more_than_there_is_runs(shared: RayExecutor, call: TaskCall) -> None:
    handle = shared.submit(replace(call, cpus=64.0, memory_bytes=1 << 45))
    assert collect(shared, 1)[handle].output is not None


def test_workers_are_reused_and_have_one_thread_per_cpu(shared: RayExecutor, call: TaskCall) -> None:
    for number in range(30):
        shared.submit(replace(call, params={"payload": number}))
    collect(shared, 30)
    workers = [process for process in family(shared) if process.name().startswith("ray::")]
    workers = [process for process in workers if "Agent" not in process.name()]
    assert 1 <= len(workers) <= 4
    for number in range(30, 60):
        shared.submit(replace(call, params={"payload": number}))
    collect(shared, 30)
    assert {process.pid for process in workers} & {process.pid for process in family(shared)}


def test_ray_listens_on_loopback_addresses_alone(shared: RayExecutor) -> None:
    addresses = set()
    for process in family(shared):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                addresses.add(connection.laddr.ip)
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_cancel_stops_a_running_call(shared: RayExecutor, call: TaskCall) -> None:
    handle = shared.submit(replace(call, params={"seconds": 300.0}))
    until(lambda: bool(running(shared)))
    started = time.monotonic()
    shared.cancel(handle)
    ended = collect(shared, 1)
    assert ended[handle].output is None
    assert ended[handle].fault == Fault.INFRASTRUCTURE
    assert time.monotonic() - started < 30


def test_killed_worker_is_a_fault_of_the_infrastructure(shared: RayExecutor, call: TaskCall) -> None:
    until(lambda: not running(shared))  # a worker whose call was cancelled may take a moment to let go of it
    handle = shared.submit(replace(call, params={"seconds": 300.0}))
    until(lambda: bool(running(shared)))
    for process in running(shared):
        process.kill()
    ended = collect(shared, 1)
    assert ended[handle].fault == Fault.INFRASTRUCTURE
    assert "\n" not in ended[handle].error
    assert shared.alive()
    again = shared.submit(call)
    assert collect(shared, 1)[again].output is not None


def lanes(executor: RayExecutor) -> list[psutil.Process]:
    """Return the workers of lanes."""
    return [process for process in family(executor) if process.name().startswith("ray::RayLane")]


def open_lane(executor: RayExecutor, call: TaskCall) -> None:
    """Run brief calls until there is a lane for the next."""

    def is_open() -> bool:
        for _ in range(20):
            executor.submit(replace(call, brief=True))
        collect(executor, 20)
        return bool(lanes(executor))

    until(is_open)


def test_brief_calls_share_workers_and_one_that_fails_fails_alone(
    shared: RayExecutor, call: TaskCall, tmp_path: Path
) -> None:
    open_lane(shared, call)
    brief = [replace(call, params={"payload": number}, brief=True) for number in range(60)]
    # One in the middle cannot be run, as its store is not there.
    brief[30] = replace(brief[30], store_url=str(tmp_path / "nowhere"))
    handles = {shared.submit(each): each for each in brief}
    ended = collect(shared, 60)
    for handle, each in handles.items():
        output = ended[handle].output
        if each is brief[30]:
            assert "nowhere" in ended[handle].error
        else:
            assert output is not None
            assert output.outputs == execute_call(each).outputs
    # Others get the room of lanes that have nothing to do.
    wide = shared.submit(replace(call, cpus=2.0))
    assert collect(shared, 1)[wide].output is not None


def test_killed_worker_of_brief_calls_costs_the_call_that_it_ran(shared: RayExecutor, call: TaskCall) -> None:
    open_lane(shared, call)
    late = shared.submit(replace(call, params={"seconds": 300.0}, brief=True))
    others = [shared.submit(replace(call, params={"payload": each}, brief=True)) for each in range(30)]
    ended = collect(shared, 30)
    assert set(ended) == set(others)
    assert all(each.output is not None for each in ended.values())
    ended = {}

    def kill() -> bool:
        # Where it was not known yet that the call had begun, it runs once more.
        for process in [*running(shared), *lanes(shared)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        ended.update({each.handle: each for each in shared.wait(1.0)})
        return late in ended

    until(kill)
    assert ended[late].fault == Fault.INFRASTRUCTURE
    again = shared.submit(replace(call, brief=True))
    assert collect(shared, 1)[again].output is not None


def test_cancel_stops_a_brief_call_that_takes_long(shared: RayExecutor, call: TaskCall) -> None:
    open_lane(shared, call)
    late = shared.submit(replace(call, params={"seconds": 300.0}, brief=True))
    # Those behind it end elsewhere once it is known to have begun.
    others = {shared.submit(replace(call, params={"payload": each}, brief=True)) for each in range(5)}
    assert set(collect(shared, 5)) == others
    workers = [*running(shared), *lanes(shared)]
    shared.cancel(late)
    until(lambda: any(gone([worker], 0.05) for worker in workers))
    other = shared.submit(replace(call, brief=True))
    ended: dict[int, Finished] = {}
    until(lambda: bool(ended.update({each.handle: each for each in shared.wait(0.5)}) or other in ended))
    assert ended[other].output is not None
    # Of one that went to a lane nothing is told; one that became a Ray task has failed.
    assert late not in ended or ended[late].output is None


def test_shutdown_leaves_no_process_and_no_folder(call: TaskCall) -> None:
    executor = RayExecutor.start(cpus=1)
    executor.submit(replace(call, params={"seconds": 300.0}))
    until(lambda: bool(running(executor)))
    processes, folder = family(executor), executor._log.parent
    executor.shutdown()
    assert gone(processes)
    assert not folder.exists()
    assert not executor.alive()
    with pytest.raises(ExecutorError, match="gone"):
        executor.submit(call)


@pytest.mark.parametrize(
    "victim", ["driver", *(pytest.param(name, marks=pytest.mark.slow) for name in ("raylet", "gcs_server"))]
)
def test_lost_ray_is_noticed_and_leaves_no_process(call: TaskCall, victim: str) -> None:
    executor = RayExecutor.start(cpus=1)
    try:
        executor.submit(replace(call, params={"seconds": 300.0}))
        until(lambda: bool(running(executor)))
        processes = family(executor)
        for worker in running(executor):
            worker.suspend()  # so that it cannot notice by itself that it is alone
        chosen = processes[:1] if victim == "driver" else [each for each in processes if each.name() == victim]
        for process in chosen:
            process.kill()
        until(lambda: not executor.alive(), 90.0)
        assert executor.wait(0.0) == []
        executor.shutdown()
        assert gone(processes)
    finally:
        executor.shutdown()


def test_killed_orchestrator_leaves_no_ray(call: TaskCall) -> None:
    code = (
        "import json, sys, time; from workers.execution.executor import RayExecutor\n"
        "from workers.execution.execute import TaskCall\n"
        "executor = RayExecutor.start(cpus=1); executor.submit(TaskCall(**json.loads(sys.argv[1]))); time.sleep(1)\n"
        "print(executor._process.pid, flush=True); time.sleep(300)"
    )
    request = json.dumps(replace(call, params={"seconds": 300.0}).to_json())
    with subprocess.Popen([sys.executable, "-c", code, request], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        driver = psutil.Process(int(process.stdout.readline()))
        processes = [driver, *driver.children(recursive=True)]
        assert {"raylet", "gcs_server"} <= {each.name() for each in processes}
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert gone(processes)


def test_cluster_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(ExecutorError, match=r"got no answer within 3 s, wanted a cluster at 127\.0\.0\.1:9"):
        RayExecutor.start("127.0.0.1:9", timeout=3.0)


def test_nobody_else_may_enter_a_local_rays_folder_or_use_it(shared: RayExecutor) -> None:
    """Ray opens its own folders to everybody, so they lie in one that is not; its token is in no file."""
    private = shared._log.parent
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    sessions = [path for path in private.rglob("session_*") if path.is_dir() and not path.is_symlink()]
    assert sessions
    assert all(private in path.parents for path in sessions)
    raylet = next(each for each in family(shared) if each.name() == "raylet")
    environment = raylet.environ()
    assert len(environment["RAY_AUTH_TOKEN"]) == 64
    assert environment["RAY_AUTH_MODE"] == "token"
    gcs = next(each for each in family(shared) if each.name() == "gcs_server")
    port = next(word.partition("=")[2] for word in gcs.cmdline() if word.startswith("--gcs_server_port="))
    if port == "0":
        port = str(min(each.laddr.port for each in gcs.net_connections("tcp") if each.status == psutil.CONN_LISTEN))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        with pytest.raises(ExecutorError, match="wanted a cluster at"):
            RayExecutor.start(f"127.0.0.1:{port}", timeout=20.0)


def test_processes_of_ray_do_not_know_the_database(shared: RayExecutor) -> None:
    for process in family(shared):
        assert "QUANTMILL_DB" not in process.environ()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of one machine that we did not start through an executor, with a token of its own; its address."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", python_path())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A socket's path may have 107 characters at most, so not below pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=1", "--include-dashboard=false", "--temp-dir", folder]
        server = subprocess.Popen(
            [*command, f"--object-store-memory={80 << 20}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: any(Path(folder).glob("session_*/sockets/raylet*")))
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        yield f"127.0.0.1:{port}"
        for process in processes:
            if process.is_running():
                process.kill()
        server.wait()


def test_executor_connects_to_a_cluster_and_leaves_it_alone(cluster: str, call: TaskCall) -> None:
    for _ in range(2):
        executor = RayExecutor.start(cluster, timeout=60.0)
        try:
            assert executor.capacity().cpus == 1.0
            handle = executor.submit(call)
            assert collect(executor, 1)[handle].output is not None
        finally:
            executor.shutdown()
