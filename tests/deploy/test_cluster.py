"""The whole topology as processes: jobs by the command line, two orchestrators, metrics, logs, and a clean end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.compose import ROOT
from orchestrator.db.queries import add_model, create_job, enqueue_graph
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database, open_database
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.monitoring.metrics import METRICS
from orchestrator.settings import resolve_settings

pytestmark = [pytest.mark.ray, pytest.mark.postgres]

START_SECONDS = 240.0
SMALL = {
    "sampler.num_inference_steps": "3",
    "calibration.seeds": "2",
    "calibration.shard_seeds": "1",
    "evaluation.seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}
DIGEST = "ab" * 32


@dataclass(frozen=True)
class Cluster:
    """A running topology: its folder, its process, and what it said of itself."""

    state: Path
    process: subprocess.Popen[bytes]

    @property
    def document(self) -> dict[str, Any]:
        """What a program has to know."""
        found: dict[str, Any] = json.loads((self.state / "cluster.json").read_text(encoding="utf-8"))
        return found

    def quantmill(self, *words: str) -> Any:
        """Call the command line with the cluster's variables; return its JSON."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTMILL", "RAY", "AWS"))}
        command = [sys.executable, "-m", "orchestrator.cli", *words, "--json"]
        done = subprocess.run(
            command, env=clean | self.document["environment"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def database(self) -> Database:
        """Open the cluster's database."""
        return open_database(resolve_settings(self.document["environment"]).database_url)

    def logs(self, service: str) -> list[dict[str, Any]]:
        """Return the lines of an orchestrator's log."""
        lines = (self.state / "logs" / f"{service}.log").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def get(self, orchestrator: int, path: str) -> str:
        """Return what an orchestrator's port answers."""
        port = self.document["ports"][f"METRICS_PORT_{orchestrator}"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return str(answer.read().decode())


def wait_until(condition: Any, what: str, seconds: float = 120.0) -> None:
    """Wait for something that takes as long as a busy machine needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The topology with one CPU a worker; at the end it is stopped as a user would, and nothing may be left."""
    # Not in pytest's own folder: Postgres runs as another user where this runs as root.
    state = Path(tempfile.mkdtemp(prefix="quantmill-topology-"))
    state.chmod(0o711)
    environment = os.environ | {"CPU_WORKER_CPUS": "1", "GPU_WORKER_CPUS": "1", "RAY_DASHBOARD": "false"}
    output = (state / "output").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cluster", "--state", str(state), "--free-ports"],
        cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
    )  # fmt: skip

    def said() -> str:
        return (state / "output").read_text(encoding="utf-8")

    try:
        wait_until(lambda: (state / "cluster.json").exists() or process.poll() is not None, "a start", START_SECONDS)
        assert process.poll() is None, said()
        yield Cluster(state, process)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) > 10
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
        assert said().splitlines()[-1] == "stopping"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        output.close()
        shutil.rmtree(state, ignore_errors=True)


def noops(rows: int, width: int, payload: str) -> list[TaskNode]:
    """Plan rows of short tasks that each read one of the row before, and one last task."""
    nodes: list[TaskNode] = []
    row: list[TaskNode] = []
    for level in range(rows):
        before, row = row, []
        for place in range(width):
            inputs = {"sources": [TaskRef(before[place].id, "blob")] if before else []}
            row.append(task_node("noop", {"payload": [payload, level, place], "seconds": 0.1}, inputs))
        nodes += row
    return [*nodes, task_node("noop", {"payload": payload}, {"sources": [TaskRef(node.id, "blob") for node in row]})]


def submit_noops(cluster: Cluster, nodes: list[TaskNode]) -> str:
    """Queue a job of noops, which no recipe has."""
    database = cluster.database()
    with database.session() as session:
        model = add_model(session, ModelRow("model", DIGEST, "Model", "here", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="noops", recipe={}, recipe_digest=DIGEST)
        enqueue_graph(session, job, nodes, nodes[-1])
    database.close()
    return job


def test_both_orchestrators_take_part_and_show_it(cluster: Cluster) -> None:
    # Many more tasks than both need to be seen at work: what is left is cancelled.
    job = submit_noops(cluster, noops(200, 8, "both"))

    def claimed_by_both() -> bool:
        return all(any(line.get("job") == job for line in cluster.logs(f"orchestrator-{n}")) for n in (1, 2))

    wait_until(claimed_by_both, "tasks started by both orchestrators")

    # Two nodes with a CPU each, and a head that computes nothing.
    def both_metrics() -> str:
        return cluster.get(1, "/metrics") + cluster.get(2, "/metrics")

    # What an orchestrator shows of the cluster is from its last look.
    wait_until(lambda: both_metrics().count("quantmill_cluster_cpus 2.0") == 2, "both to have seen both nodes")
    text = both_metrics()
    assert text.count('quantmill_jobs{state="running"} 1.0') == 2
    assert 'quantmill_tasks{kind="noop",state="blocked"}' in text
    assert "quantmill_store_bytes" in text
    assert {name for name in re.findall(r"^(quantmill_\w+?)(?:_bucket|_count|_sum)?[{ ]", text, re.MULTILINE)} <= set(
        METRICS
    )
    assert json.loads(cluster.get(1, "/readyz"))["ready"] is True
    assert cluster.quantmill("jobs", "cancel", job)["state"] == "cancelled"
    again = submit_noops(cluster, noops(3, 2, "small"))
    assert cluster.quantmill("jobs", "wait", again)["tasks"]["succeeded"] == 7
    for number in (1, 2):
        lines = [line for line in cluster.logs(f"orchestrator-{number}") if line["message"].startswith("task ")]
        assert lines
        assert all(
            {"job", "task", "attempt", "kind"} <= set(line) for line in lines if line["message"] == "task started"
        )


@pytest.mark.slow
def test_another_takes_over_from_one_that_is_killed(cluster: Cluster) -> None:
    job = submit_noops(cluster, noops(20, 8, "killed"))
    first = cluster.document["pids"]["orchestrator-1"]
    wait_until(lambda: any(line.get("job") == job for line in cluster.logs("orchestrator-1")), "tasks of the first")
    psutil.Process(first).kill()
    assert cluster.quantmill("jobs", "wait", job)["state"] == "succeeded"
    # As the compose file says, it is started again.
    wait_until(lambda: cluster.document["pids"]["orchestrator-1"] != first, "another first orchestrator")


@pytest.mark.slow
def test_a_model_is_quantized_by_the_topology(cluster: Cluster) -> None:
    sets = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    words = ["minmax-w8a8", "--model", "examples/models/digits", *sets, "--name", "small", "--wait"]
    job = cluster.quantmill("submit", *words)
    assert (job["state"], job["release"]) == ("succeeded", "small@1")
    folder = cluster.state / "pulled"
    assert cluster.quantmill("artifacts", "pull", "small", str(folder))["digest"] == job["digest"]
    assert (folder / "manifest.json").is_file()
    text = cluster.get(1, "/metrics")
    assert 'quantmill_results_total{device="cpu",kind="pack"} 1.0' in text


def test_the_cluster_lets_nobody_in_without_its_secrets(cluster: Cluster) -> None:
    environment = cluster.document["environment"]
    secrets = cluster.state / "secrets"
    assert environment["QUANTMILL_DB_PASSWORD_FILE"] == str(secrets / "database_password")
    password = (secrets / "database_password").read_text(encoding="utf-8")
    for process in psutil.Process(cluster.process.pid).children(recursive=True):
        words = " ".join(process.cmdline())
        assert password not in words
        assert (secrets / "ray_token").read_text(encoding="utf-8") not in words
        assert (secrets / "store_keys").read_text(encoding="utf-8").partition(",")[2] not in words
    for listening in psutil.net_connections("tcp"):
        if listening.status == "LISTEN" and listening.laddr.port in cluster.document["ports"].values():
            assert (
                listening.laddr.ip.startswith("127.") or listening.laddr.port == cluster.document["ports"]["RAY_PORT"]
            )
    (cluster.state / "wrong").write_text("0" * 64, encoding="utf-8")
    address = f"127.0.0.2:{cluster.document['ports']['RAY_PORT']}"
    code = f"import ray._raylet as r; print(len(r.GcsClient(address='{address}').get_all_node_info(timeout=10)))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    for token, let_in in ((None, False), (cluster.state / "wrong", False), (secrets / "ray_token", True)):
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if token else {}
        asked = subprocess.run([sys.executable, "-c", code], env=clean | variables, capture_output=True, check=False)
        assert (asked.returncode == 0, asked.stdout.strip() == b"3") == (let_in, let_in)
