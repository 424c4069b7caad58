"""Devices as a user chooses and sees them: options of submit and run, jobs show, the progress line."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from orchestrator.actions.gpu_check import judge
from orchestrator.db.models import JobTask, KindTiming, Task
from orchestrator.db.orchestrators import (
    OrchestratorNote,
    OrchestratorState,
    forget_orchestrator,
    see_orchestrator,
)
from orchestrator.db.session import open_database
from orchestrator.scheduling.picker import Places
from orchestrator.settings import resolve_settings
from quant_spec.enums import Device
from quant_spec.kinds import KINDS
from quant_spec.resources import JobResources
from tests.orchestrator.cli.test_cli_run import SET
from tests.orchestrator.in_process import InProcess
from workers.errors import Fault
from workers.execution.cluster import LOGICAL_GPU_GIB, Node, own_versions
from workers.execution.execute import TaskCall
from workers.execution.executor import Capacity
from workers.execution.nodes import gpu_type_name

Cli = Callable[..., Any]
GIB = 2**30
GPU_KINDS = {"calibrate", "round", "reference", "evaluate"}


class OnNodes(InProcess):
    """Runs each call here, whatever node it is for; keeps the calls."""

    def __init__(self, nodes: Capacity) -> None:
        super().__init__()
        self._nodes = nodes
        self.calls: list[TaskCall] = []

    def answer(self, call: TaskCall) -> dict[str, Any]:
        """Run a call with the GPUs that Ray would have given it."""
        self.calls.append(call)
        given = [f"cuda:{number}" for number in range(int(call.gpus))]
        return super().answer(replace(call, devices=given) if len(given) > 1 else call)

    def capacity(self) -> Capacity:
        """Return what the nodes have."""
        return self._nodes


def node(name: str, gpus: int = 0, **options: Any) -> Node:
    """Return a node with this machine's software, whose GPUs have 40 GiB."""
    facts: dict[str, Any] = {"gpu_type": "A100", "gpu_memory_bytes": 40 * GIB, "cuda_ok": True} if gpus else {}
    return Node(name, name, 2.0, 16 * GIB, gpus, **{"versions": own_versions(), **facts, **options})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OnNodes]:
    """Let jobs run in the test's own process as if on these nodes."""

    def use(*nodes: Node, logical: bool = True, executor: Callable[[Capacity], OnNodes] = OnNodes) -> OnNodes:
        sums = (sum(each.cpus for each in nodes), sum(each.gpus for each in nodes), sum(n.memory_bytes for n in nodes))
        made = executor(Capacity(*sums, nodes))
        monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: made)
        if logical:
            monkeypatch.setenv(LOGICAL_GPU_GIB, "40")
        return made

    return use


@pytest.mark.usefixtures("with_digits")
def test_submitted_device_is_where_tasks_run(cli: Cli, cluster: Callable[..., OnNodes]) -> None:
    cluster(node("cpu-1"), node("gpu-1", gpus=2))
    words = ("submit", "minmax-w8a8", "--model", "digits", *SET, "--device", "cuda", "--gpu-type", "a100")
    job = cli(*words, "--json").json["job"]
    waiting = cli("jobs", "show", job, "--json").json
    assert (waiting["device"], waiting["gpu_type"], waiting["ran"]) == ("cuda", "a100", [])
    assert cli("serve", "--drain").code == 0
    view = cli("jobs", "show", job, "--json").json
    assert view["state"] == "succeeded"
    devices = {(task["kind"], task["device"], task["node"]) for task in view["ran"]}
    assert {each for each in devices if each[0] in GPU_KINDS} == {(kind, "A100", "gpu-1") for kind in GPU_KINDS}
    assert {device for kind, device, _ in devices if kind in ("pack", "score", "release")} == {"cpu"}
    assert len(view["ran"]) == view["tasks"]["total"]
    assert all(task["versions"] == own_versions() for task in view["ran"])
    text = cli("jobs", "show", job).out
    assert "device    cuda a100" in text
    assert "gpu-1 A100: " in text
    table = cli("jobs", "show", job, "--tasks").out
    assert "GPU MEMORY" in table
    assert table.count("gpu-1") > len(GPU_KINDS)
    finished = [each for each in cli("jobs", "logs", job, "--json").json if each["event"] == "finished"]
    assert {each["data"]["node"] for each in finished} == {"cpu-1", "gpu-1"}


@pytest.mark.usefixtures("with_digits")
def test_run_takes_gpus_where_there_are_some_and_a_deterministic_recipe_one_type(
    cli: Cli, cluster: Callable[..., OnNodes]
) -> None:
    cluster(node("gpu-1", gpus=1), node("gpu-2", gpus=1, gpu_type="H100", gpu_memory_bytes=80 * GIB))
    answer = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--set", "deterministic=true", "--json")
    view = answer.json
    assert (view["device"], view["gpu_type"]) == ("cuda", "A100")
    assert {task["device"] for task in view["ran"] if task["kind"] in GPU_KINDS} == {"A100"}
    assert "GPUs " in answer.err
    assert "/2 busy" in answer.err


def estimates(home: Path, job: str) -> dict[str, int]:
    """Return the device memory that a job's tasks ask for: the most of each kind."""
    database = open_database(resolve_settings({}, home=str(home)).database_url)
    with database.session(read_only=True) as session:
        wanted = select(JobTask.task_id).where(JobTask.job_id == job)
        found = session.execute(select(Task.kind, Task.gpu_memory_bytes).where(Task.id.in_(wanted))).all()
    database.close()
    return {kind: max(each.gpu_memory_bytes for each in found if each.kind == kind) for kind, _ in found}


@pytest.mark.usefixtures("with_digits")
def test_a_model_that_no_gpu_holds_is_calibrated_on_several(
    cli: Cli, cluster: Callable[..., OnNodes], home: Path
) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--json").json["job"]
    needed = estimates(home, job)["calibrate"]
    executor = cluster(node("gpu-1", gpus=3, gpu_memory_bytes=int(0.7 * needed)))
    assert cli("serve", "--drain").code == 0
    view = cli("jobs", "show", job, "--json").json
    assert view["state"] == "succeeded"
    assert {call.gpus for call in executor.calls if call.kind == "calibrate"} == {2.0}
    assert {task["device"] for task in view["ran"] if task["kind"] == "calibrate"} == {"A100"}
    assert view["metrics"]["psnr_db"] > 30


class Greedy(OnNodes):
    """Lets calibration run out of memory with more than half of its samples at once, and take much of it."""

    def answer(self, call: TaskCall) -> dict[str, Any]:
        """Run a call, or say what torch would."""
        if call.kind != "calibrate":
            return super().answer(call)
        if call.batch_divisor < 2:
            self.calls.append(call)
            return {"error": "OutOfMemoryError: CUDA out of memory", "fault": Fault.MEMORY.value}
        answer = super().answer(call)
        return answer | {"ran": answer["ran"] | {"peak_gpu_bytes": 3 * GIB}}


@pytest.mark.usefixtures("with_digits")
def test_memory_that_runs_out_is_no_fault_of_the_task_and_is_learned_from(
    cli: Cli, cluster: Callable[..., OnNodes], home: Path
) -> None:
    executor = cluster(node("gpu-1", gpus=1, gpu_memory_bytes=4 * GIB), executor=Greedy)
    words = ("run", "minmax-w8a8", "--model", "digits", *SET, "--set", "calibration.shard_seeds=4")
    view = cli(*words, "--json").json
    assert view["state"] == "succeeded"
    first, second = (call for call in executor.calls if call.kind == "calibrate")
    assert (first.gpus < 0.5, first.batch_divisor) == (True, 1)
    assert (second.gpus, second.batch_divisor) == (1.0, 2)
    retried = [each for each in cli("jobs", "logs", view["job"], "--json").json if each["event"] == "retried"]
    assert [each["data"]["fault"] for each in retried] == ["memory"]
    assert "CUDA out of memory" in retried[0]["data"]["error"]
    # What it took is what the next one gets.
    executor.calls.clear()
    assert cli(*words, "--set", "calibration.first_seed=2000000").code == 0
    third = next(call for call in executor.calls if call.kind == "calibrate")
    assert third.gpus > first.gpus


@pytest.mark.usefixtures("with_digits")
def test_a_recipe_says_what_it_may_have(cli: Cli, cluster: Callable[..., OnNodes], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: minmax-w8a8\nresources: {device: cuda, gpu_type: H100, task_minutes: 7}\n")
    executor = cluster(node("gpu-1", gpus=1), node("gpu-2", gpus=1, gpu_type="H100"), node("cpu-1"))
    job = cli("submit", recipe, "--model", "digits", *SET, "--json").json["job"]
    assert cli("serve", "--drain").code == 0
    view = cli("jobs", "show", job, "--json").json
    assert (view["state"], view["device"], view["gpu_type"]) == ("succeeded", "cuda", "H100")
    assert {task["device"] for task in view["ran"] if task["kind"] in GPU_KINDS} == {"H100"}
    assert {call.deadline_seconds for call in executor.calls} == {420.0}


@pytest.mark.usefixtures("with_digits")
def test_job_that_waits_for_a_gpu_says_so(
    cli: Cli, cluster: Callable[..., OnNodes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(node("gpu-1", gpus=1))
    stop = threading.Event()
    monkeypatch.setattr("orchestrator.cli.run.stop_on_signals", lambda: nullcontext(stop))

    class Stopper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "tasks wait for a GPU" in record.getMessage():
                stop.set()

    log, stopper = logging.getLogger("orchestrator"), Stopper()
    log.addHandler(stopper)
    try:
        answer = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--device", "cuda", "--gpu-type", "H100")
    finally:
        log.removeHandler(stopper)
    assert answer.code == 101
    assert "tasks wait for a GPU: wanted H100, got gpu-1: 1 x A100" in caplog.text


def note_cluster(home: Path, *nodes: Node) -> None:
    """Let an orchestrator elsewhere say which nodes it sees."""
    places = Places(2.0)
    places.look(nodes)
    database = open_database(resolve_settings({}, home=str(home)).database_url)
    with database.session() as session:
        note = OrchestratorNote("elsewhere:1", "elsewhere", 1, OrchestratorState.WORKING, None, places.document())
        see_orchestrator(session, note)
    database.close()


@pytest.mark.usefixtures("with_digits")
@pytest.mark.parametrize(
    ("options", "wanted"), [(("--device", "cuda"), "a GPU"), (("--gpu-type", "H100"), "a GPU of type H100")]
)
def test_job_whose_gpu_no_cluster_has_is_shown_to_wait_for_it(
    cli: Cli, home: Path, options: tuple[str, ...], wanted: str
) -> None:
    words = ("submit", "minmax-w8a8", "--model", "digits", *SET, *options)
    job = cli(*words, "--json").json["job"]
    view = cli("jobs", "show", job, "--json").json
    assert (view["state"], view["waiting"], view["device"]) == ("queued", None, "cuda")
    note_cluster(home, node("cpu-1"), node("a-1", gpus=0 if wanted == "a GPU" else 2))
    reason = f"cluster: got {'no GPU that can be used' if wanted == 'a GPU' else 'a-1: 2 x A100'}, wanted {wanted}"
    view = cli("jobs", "show", job, "--json").json
    assert (view["state"], view["waiting"]) == ("queued", reason)
    assert f"waiting   {reason}" in cli("jobs", "show", job).out
    assert " waiting " in cli("jobs", "ls").out
    assert f"job {job}: waiting for the {reason}" in cli("jobs", "wait", job, "--timeout", "0").err
    again = cli(*words, "--set", "seed=7")
    assert f"waiting for the {reason}" in again.err
    # Once there is one, it is a matter of turns.
    note_cluster(home, node("h-1", gpus=1, gpu_type="h100"))
    assert cli("jobs", "show", job, "--json").json["waiting"] is None
    assert " waiting " not in cli("jobs", "ls").out


@pytest.mark.usefixtures("with_digits")
def test_jobs_that_may_run_anywhere_wait_for_no_gpu(cli: Cli, home: Path) -> None:
    note_cluster(home, node("cpu-1"))
    for options in ((), ("--device", "cpu")):
        job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, *options, "--json").json["job"]
        assert cli("jobs", "show", job, "--json").json["waiting"] is None


@pytest.mark.usefixtures("with_digits")
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_run_on_a_machine_without_a_gpu_refuses_to_wait_for_one(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: minmax-w8a8\nresources: {gpu_type: H100}\n")
    search = tmp_path / "search.yaml"
    search.write_text("name: s\nrecipe: mine.yaml\nmodels: [digits]\nbudgets: [{weight_bits_mean: 6.0}]\n")
    for words in (("minmax-w8a8", "--device", "cuda"), ("minmax-w8a8", "--gpu-type", "H100"), (recipe,)):
        answer = cli("run", *words, "--model", "digits", *SET)
        assert (answer.code, answer.err.count("\n")) == (2, 1), answer
        assert "resources.device: got cuda, but this machine has no GPU driver" in answer.err
    answer = cli("search", "run", search)
    assert (answer.code, "this machine has no GPU driver" in answer.err) == (2, True), answer
    assert cli("jobs", "ls", "--json").json == []


def test_types_of_gpu_can_be_asked_for_by_what_they_are_called() -> None:
    for said, name in (("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"), ("A100", "A100"), (" (x) " * 40, None)):
        called = gpu_type_name(said)
        assert name is None or called == name
        assert JobResources(gpu_type=called).device is Device.CUDA


@pytest.mark.usefixtures("with_digits")
def test_doctor_does_not_count_nodes_that_nobody_has_looked_for(cli: Cli, home: Path) -> None:
    cli("models", "ls")
    note_cluster(home)
    checks = {check["name"]: check for check in cli("doctor", "--json").json["checks"]}
    assert checks["nodes"]["detail"].startswith("1 orchestrators at work, none of which has had a task")
    note_cluster(home, node("a-1", gpus=2))
    checks = {check["name"]: check for check in cli("doctor", "--json").json["checks"]}
    assert checks["nodes"]["detail"] == "1 orchestrators at work see 1 nodes with 2 GPUs, and use all of them"


@pytest.mark.usefixtures("with_digits")
def test_submitted_without_a_gpu_is_said(cli: Cli) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--device", "cpu", "--json").json["job"]
    assert cli("jobs", "show", job, "--json").json["device"] == "cpu"


@pytest.mark.usefixtures("with_digits")
def test_node_that_refuses_is_left_out_and_the_job_goes_on(
    cli: Cli, cluster: Callable[..., OnNodes], caplog: pytest.LogCaptureFixture
) -> None:
    """Its torch sees no CUDA device though the cluster says that it has one; another node is of another version."""
    old = dict(own_versions()) | {"diffusers": "0.1"}
    cluster(node("blind", gpus=1), node("old", versions=old), logical=False)
    with caplog.at_level(logging.WARNING, "orchestrator"):
        answer = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--json")
    assert answer.code == 0
    assert {(task["node"], task["device"]) for task in answer.json["ran"]} == {("blind", "cpu")}
    log = caplog.text
    assert "node left out: blind: got 0 CUDA devices from torch" in log
    assert f"node left out: old: got diffusers 0.1, wanted diffusers {own_versions()['diffusers']}" in log
    events = cli("jobs", "logs", answer.json["job"], "--json").json
    refused = [each for each in events if each["event"] == "retried"]
    assert refused
    assert {each["data"]["fault"] for each in refused} == {"refused"}


@pytest.mark.usefixtures("with_digits")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "'tpu' is not one of"),
        (("--device", "cpu", "--gpu-type", "H100"), "gpu_type: got H100 with device cpu, wanted null"),
        (("--gpu-type", "x y"), "resources.gpu_type: got 'x y'"),
    ],
)
def test_bad_devices_are_refused(cli: Cli, home: Path, options: tuple[str, ...], message: str) -> None:
    answer = cli("submit", "minmax-w8a8", "--model", "digits", *options)
    assert answer.code == 2
    assert message in answer.err
    assert cli("jobs", "ls", "--json").json == []


@pytest.mark.usefixtures("with_digits")
def test_nodes_that_orchestrators_leave_out_are_named(cli: Cli, home: Path) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--json").json["job"]
    places = Places(2.0)
    places.look((node("good", gpus=2), node("old", versions={"torch": "1.0"})))
    database = open_database(resolve_settings({}, home=str(home)).database_url)
    with database.session() as session:
        note = OrchestratorNote("elsewhere:1", "elsewhere", 1, OrchestratorState.WORKING, None, places.document())
        see_orchestrator(session, note)
    wanted = f"old: got torch 1.0, wanted torch {own_versions()['torch']}, as the orchestrator has"
    assert cli("jobs", "show", job, "--json").json["left_out"] == [wanted]
    assert f"left out  {wanted}" in cli("jobs", "show", job).out
    answer = cli("doctor", "--json")
    assert (answer.code, {c["name"]: c["detail"] for c in answer.json["checks"]}["nodes"]) == (1, wanted)
    dry = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--dry-run", "--json").json["estimated_seconds"]
    with database.session() as session:
        timing = {"kind": "evaluate", "version": KINDS["evaluate"].version, "device": "A100", "n": 1}
        session.execute(insert(KindTiming).values(**timing, seconds=5000.0, work=0.001))
    slow = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--dry-run", "--json").json["estimated_seconds"]
    assert slow > 10 * dry  # what such tasks took on the type of GPU that the cluster has
    with database.session() as session:
        forget_orchestrator(session, "elsewhere:1")
    assert cli("jobs", "show", job, "--json").json["left_out"] == []
    again = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--dry-run", "--json").json["estimated_seconds"]
    assert again == dry
    database.close()


def test_doctor_says_what_gpus_there_are(cli: Cli) -> None:
    checks = {check["name"]: check for check in cli("doctor", "--json").json["checks"]}
    gpu = checks["gpu"]
    assert gpu["ok"]
    assert gpu["detail"].startswith(("no GPU: ", "driver "))


def test_gpus_are_judged() -> None:
    cpu_build = {"torch": "2.13.0+cpu", "cuda": None, "gpus": [], "kernel": "", "peers": [0, 0]}
    assert judge(None, cpu_build) == (True, "no GPU: no driver, torch 2.13.0+cpu for CPUs alone; tasks run on CPUs")
    ok, line = judge("580.1 with 2 GPUs", cpu_build)
    assert not ok
    assert line.startswith("driver 580.1 with 2 GPUs: got torch 2.13.0+cpu for CPUs alone, which sees none of them")
    gpu = {"name": "NVIDIA H100", "free": 70 * 10**9, "total": 80 * 10**9}
    good = {"torch": "2.13.0+cu130", "cuda": "13.0", "gpus": [gpu, gpu], "kernel": "", "peers": [2, 2]}
    ok, line = judge("580.1 with 2 GPUs", good)
    assert ok
    assert "NVIDIA H100 70.0 GB of 80.0 GB free" in line
    assert "2 of 2 pairs have peer access" in line
    broken = good | {"kernel": "a Triton kernel failed: x"}
    assert judge("580.1 with 2 GPUs", broken) == (False, "a Triton kernel failed: x")
