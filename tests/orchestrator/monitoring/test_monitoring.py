"""`serve --metrics`: what Prometheus reads, what health checks get, and what JSON logs say, from the command line."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert, update

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Orchestrator, Task
from orchestrator.db.monitoring import overview
from orchestrator.db.queries import add_model, claim_tasks, create_job, enqueue_graph
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database, open_database
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.logs import LogFormat, log_to_stderr
from orchestrator.monitoring.health import health
from orchestrator.monitoring.metrics import METRICS, reference_table
from orchestrator.monitoring.server import _Handler, _Server, monitoring
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.scheduling.watch import SchedulerStatus, Watch
from quant_spec.generated_table import with_table
from tests.orchestrator.in_process import InProcess
from workers.storage.store import open_store

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]
DIGEST = hashlib.sha256(b"model").hexdigest()


def chain(length: int, payload: Any = "") -> list[TaskNode]:
    """Plan tasks that each read the one before."""
    nodes: list[TaskNode] = []
    for place in range(length):
        inputs = {"sources": [TaskRef(nodes[-1].id, "blob")] if nodes else []}
        nodes.append(task_node("noop", {"payload": [payload, place]}, inputs))
    return nodes


def submit(database: Database, nodes: list[TaskNode]) -> str:
    """Queue a job of these tasks."""
    with database.session() as session:
        model = add_model(session, ModelRow("model", DIGEST, "Model", "here", 0, 0, {}))
        job = create_job(session, model=model, recipe_name="recipe", recipe={}, recipe_digest=DIGEST)
        enqueue_graph(session, job, nodes, nodes[-1])
    return job


def get(address: str) -> str:
    """Return what an address answers."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def scrape(address: str) -> dict[tuple[str, ...], float]:
    """Return every sample of ours: name and values of its labels in the table's order to number."""
    found = {}
    for family in text_string_to_metric_families(get(address)):
        for sample in family.samples:
            metric = METRICS.get(sample.name.removesuffix("_count"))
            if metric is not None:
                assert set(sample.labels) == set(metric.labels)
                found[(sample.name, *(sample.labels[label] for label in metric.labels))] = sample.value
    return found


@pytest.fixture
def watched(database: Database, tmp_path: Path) -> Iterator[tuple[Database, Watch, str]]:
    """A database, the watch of a scheduler on it, and the address of the metrics; the store has two blobs."""
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    for data in (b"four", b"seven b"):
        store.put_bytes(data)
    with monitoring(database, store, "127.0.0.1", 0, "here:1") as (watch, address):
        yield database, watch, address


def test_the_queue_is_counted_by_state_and_kind(watched: tuple[Database, Watch, str]) -> None:
    database, _, address = watched
    submit(database, chain(3))
    with database.session() as session:
        assert len(claim_tasks(session, owner="x", limit=1, lease_seconds=60)) == 1
    submit(database, chain(1, "other"))
    with database.session() as session:
        session.execute(update(Task).where(Task.state == "queued").values(queued_at=epoch_seconds() - 100))
        row = {"host": "h", "pid": 1, "started_at": 0.0, "cluster": {}}
        for name, age, state in (("a", 1, "working"), ("b", 2, "waiting"), ("gone", 600, "working")):
            values = {**row, "id": name, "state": state, "seen_at": epoch_seconds() - age}
            session.execute(insert(Orchestrator).values(values))
    found = scrape(address)
    tasks = {key[1:]: value for key, value in found.items() if key[0] == "quantmill_tasks"}
    assert tasks == {("blocked", "noop"): 2, ("queued", "noop"): 1, ("running", "noop"): 1}
    assert 100 <= found["quantmill_oldest_ready_task_seconds",] < 160
    assert (found["quantmill_jobs", "running"], found["quantmill_jobs", "queued"]) == (1, 1)
    alive = {key[1]: value for key, value in found.items() if key[0] == "quantmill_orchestrators"}
    assert alive == {"working": 1, "waiting": 1}


def test_a_scheduler_is_counted_as_it_works(watched: tuple[Database, Watch, str], tmp_path: Path) -> None:
    database, watch, address = watched
    submit(database, chain(3))
    submit(database, [task_node("noop", {"seconds": -1.0}, {})])
    config = SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", poll_seconds=0.05)
    Scheduler(database, InProcess, config, watch).run(drain=True)
    found = scrape(address)
    assert found["quantmill_task_seconds_count", "noop", "cpu"] == 3
    assert found["quantmill_results_total", "noop", "cpu"] == 3
    assert found["quantmill_task_faults_total", "invalid", "noop"] == 1
    assert found["quantmill_cluster_cpus",] == 2
    assert (found["quantmill_waiting",], found["quantmill_database_up",]) == (0, 1)
    assert found["quantmill_store_blobs",] >= 2
    assert found["quantmill_store_bytes",] >= len("four" + "seven b")
    assert not [key for key in found if key[0] == "quantmill_tasks"]


def test_leases_lost_and_expired_are_counted(watched: tuple[Database, Watch, str], tmp_path: Path) -> None:
    database, watch, address = watched
    submit(database, chain(1))
    with database.session() as session:
        (task,) = claim_tasks(session, owner="dead", limit=1, lease_seconds=0.0)
    watch.lost(task)
    config = SchedulerConfig(str(tmp_path / "store"), tmp_path / "cache", poll_seconds=0.05)
    Scheduler(database, InProcess, config, watch).run(drain=True)
    found = scrape(address)
    assert found["quantmill_leases_lost_total",] == 1
    assert found["quantmill_leases_expired_total",] == 1


def test_a_database_that_is_out_leaves_the_rest(tmp_path: Path, sqlite_template: Path) -> None:
    gone = tmp_path / "gone.db"
    gone.write_bytes(sqlite_template.read_bytes())
    database = open_database(f"sqlite:///{gone}")
    (tmp_path / "store").mkdir()
    with monitoring(database, open_store(str(tmp_path / "store")), "127.0.0.1", 0, "here:1") as (_, address):
        gone.unlink()
        found = scrape(address)
    assert found["quantmill_database_up",] == 0
    assert ("quantmill_oldest_ready_task_seconds",) not in found
    assert found["quantmill_tasks_in_flight",] == 0


def test_health_is_that_of_the_loop(watched: tuple[Database, Watch, str]) -> None:
    _, watch, address = watched
    base = address.removesuffix("/metrics")
    assert json.loads(get(f"{base}/healthz"))["live"] is True
    assert json.loads(get(f"{base}/readyz"))["ready"] is True
    watch.passed(waiting_for="database postgresql://here: no answer")
    assert json.loads(get(f"{base}/healthz"))["live"] is True
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(f"{base}/readyz")
    assert (refused.value.code, json.load(refused.value)["reason"]) == (503, "database postgresql://here: no answer")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{base}/")
    watch.passed()
    now = watch.status.passed_at
    assert (health(SchedulerStatus(now - 60))["live"], health(SchedulerStatus(now - 60))["ready"]) == (True, False)
    assert health(SchedulerStatus(now - 1000))["live"] is False


def test_those_that_ask_at_once_are_heard_before_the_first_is_answered() -> None:
    """Else the system answers none of their connections, and they try again after a second."""
    with _Server(("127.0.0.1", 0), _Handler) as server, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.server_address[:2], timeout=5.0))


def test_scrapes_beside_each_other_ask_the_database_once_for_what_it_costs(
    watched: tuple[Database, Watch, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, address = watched
    asked = []

    def slow(session: Any) -> Any:
        asked.append(1)
        threading.Event().wait(2)
        return overview(session)

    monkeypatch.setattr("orchestrator.monitoring.collector.overview", slow)
    for _ in range(4):
        scrape(address)
    assert len(asked) == 1


def test_the_handbook_and_the_alerts_name_metrics_that_there_are() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert with_table(page, reference_table()) == page, "python -m orchestrator.monitoring.metrics docs/monitoring.md"
    rules = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 5
    shown = {name for metric in METRICS.values() for name in (metric.name, f"{metric.name}_bucket")}
    for rule in alerts:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert {"summary"} <= set(rule["annotations"])
        assert set(re.findall(r"quantmill_\w+", rule["expr"])) <= shown
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert "quantmill_" in rule["expr"] or rule["expr"].startswith("up{")


@pytest.mark.parametrize("style", LogFormat)
def test_what_other_packages_warn_of_is_a_line_as_any_other(
    style: LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr(style)
    try:
        logging.getLogger("psycopg").warning("error ignored in\n%s", "pipeline")
    finally:
        log_to_stderr()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" warning error ignored in pipeline") or json.loads(line)["logger"] == "psycopg"


@pytest.fixture
def noop_home(cli: Cli, home: Path) -> Iterator[tuple[Path, str, str]]:
    """A home with a job of two tasks and one whose task is bad; their ids."""
    assert cli("init").code == 0
    database = open_database(f"sqlite:///{home}/quantmill.db")
    good, bad = submit(database, chain(2)), submit(database, [task_node("noop", {"seconds": -1.0}, {})])
    database.close()
    yield home, good, bad
    log_to_stderr()  # as it was before


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("by", ["option", "variable"])
def test_json_logs_name_job_task_attempt_and_kind(
    cli: Cli, noop_home: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    _, good, bad = noop_home
    if by == "variable":
        monkeypatch.setenv("QUANTMILL_LOG_FORMAT", "json")
    answer = cli("serve", "--drain", *(["--log-format", "json"] if by == "option" else []))
    assert answer.code == 0
    lines = [json.loads(line) for line in answer.err.splitlines()]
    assert lines[0]["message"].startswith("serving ")
    assert lines[-1]["message"] == "drained: 2 tasks executed here, no job is left"
    tasks = [line for line in lines if "task" in line]
    assert [line["job"] for line in tasks if line["message"] == "task finished"] == [good, good]
    assert [line["message"] for line in tasks].count("task started") == 3
    (failed,) = [line for line in tasks if line["level"] == "warning"]
    assert (failed["job"], failed["fault"]) == (bad, "invalid")
    for line in tasks:
        assert (len(line["task"]), line["attempt"], line["kind"]) == (64, 1, "noop")
        assert {"time", "level", "logger", "message", "job"} <= set(line)


@pytest.mark.usefixtures("without_ray")
def test_serving_metrics_from_the_command_line(cli: Cli, noop_home: tuple[Path, str, str]) -> None:
    answer = cli("serve", "--drain", "--metrics", "0")
    assert answer.code == 0
    assert re.search(r"^metrics on http://127\.0\.0\.1:\d+/metrics$", answer.err, re.MULTILINE)
    text_line = next(line for line in answer.err.splitlines() if "task failed" in line)
    assert f"job={noop_home[2]}" in text_line


def test_a_port_that_is_taken_is_refused(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = cli("serve", "--drain", "--metrics", port)
    assert answer.code == 2
    assert f"error: --metrics: got 127.0.0.1:{port} (Address already in use)" in answer.err
    assert cli("serve", "--metrics-host", "0.0.0.0").code == 2


def test_a_log_format_that_is_none_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTMILL_LOG_FORMAT", "xml")
    answer = cli("serve", "--drain")
    assert (answer.code, answer.err) == (2, "error: QUANTMILL_LOG_FORMAT: got 'xml', wanted text or json\n")
