"""kill -9 of the orchestrator, of a Ray worker and of the whole of Ray, at random moments of a job.

Whatever is killed: the job finishes (after an orchestrator's death, when another is started), no task that had finished
runs again, the result is the one of an undisturbed run, and no process is left over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from orchestrator.db.models import Task
from orchestrator.db.queries import (
    add_model,
    create_job,
    enqueue_graph,
    events,
    find_job,
    find_task,
    job_counts,
    list_tasks,
)
from orchestrator.db.rows import EventRow, JobRow, ModelRow
from orchestrator.db.session import Database, open_database, upgrade
from orchestrator.graph import TaskNode, TaskRef, task_node
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from orchestrator.states import JobState
from tests.orchestrator.in_process import InProcess
from workers.execution.execute import TaskCall, execute_call
from workers.execution.notes import read_progress
from workers.storage.store import open_store

pytestmark = pytest.mark.ray

# An orchestrator with short leases, so that another one need not wait half a minute for its tasks.
SERVE = """
import sys
from pathlib import Path
from orchestrator.db.session import open_database
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig
from workers.execution.executor import RayExecutor
home = Path(sys.argv[1])
config = SchedulerConfig(str(home / "store"), home / "cache", lease_seconds=3.0, poll_seconds=0.1)
Scheduler(open_database(f"sqlite:///{home}/quantmill.db"), lambda: RayExecutor.start(cpus=2), config).run(drain=True)
"""


@dataclass(frozen=True)
class Scenario:
    """A job to disturb: how it is submitted to a new home, what serves that home, and what its workers are called."""

    submit: Callable[[Path], str]
    serve: Callable[[Path], list[str]]
    kinds: frozenset[str]
    seconds: float


def layers(width: int, depth: int) -> list[TaskNode]:
    """Plan rows of tasks that each read two of the row before, and one last task that reads the last row."""
    nodes: list[TaskNode] = []
    row: list[TaskNode] = []
    for level in range(depth):
        before = row
        row = []
        for place in range(width):
            sources = [before[place], before[(place + 1) % width]] if before else []
            inputs = {"sources": [TaskRef(node.id, "blob") for node in sources]}
            params = {"payload": [level, place], "seconds": 0.05 + 0.05 * place}
            row.append(task_node("noop", params, inputs, label=f"{level}.{place}"))
        nodes += row
    last = task_node("noop", {"payload": "last"}, {"sources": [TaskRef(node.id, "blob") for node in row]})
    return [*nodes, last]


def submit_noop(home: Path) -> str:
    """Make a home with a job of 31 short tasks; return the job."""
    (home / "store").mkdir(parents=True)
    url = f"sqlite:///{home}/quantmill.db"
    upgrade(url)
    digest = hashlib.sha256(b"model").hexdigest()
    nodes = layers(6, 5)
    database = open_database(url)
    with database.session() as session:
        model = add_model(session, ModelRow("model", digest, "Model", "here", 0, 0, {}))
        recipe: dict[str, Any] = {"recipe_name": "recipe", "recipe": {}, "recipe_digest": digest}
        job = create_job(session, model=model, **recipe)
        enqueue_graph(session, job, nodes, nodes[-1])
    database.close()
    return job


ROOT = Path(__file__).parents[3]
SETTINGS = (
    "sampler.num_inference_steps=4",
    "calibration.seeds=4",
    "calibration.shard_seeds=2",
    "evaluation.seeds=8",
    "evaluation.shard_seeds=4",
    "evaluation.sqnr_seeds=4",
    "evaluation.grid=4",
)


def submit_recipe(home: Path, recipe: str, settings: tuple[str, ...]) -> str:
    """Make a home with a job of a shipped recipe and the small model; return the job."""
    sets = [word for setting in settings for word in ("--set", setting)]
    words = ["--home", str(home), "submit", recipe, "--model", "examples/models/digits", *sets, "--json"]
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["job"])


# Iterations enough for a checkpoint, of which the first comes after five seconds.
DISTILL = (
    *("passes.distill.iterations=150", "passes.distill.seeds=4", "passes.distill.shard_seeds=2"),
    # What comes before and after it is of no matter here.
    *(
        "passes.scale=null",
        "passes.allocate=null",
        "evaluation.seeds=2",
        "evaluation.sqnr_seeds=2",
        "evaluation.grid=2",
    ),
)
SCENARIOS = {
    "noop": Scenario(
        submit=submit_noop,
        serve=lambda home: [sys.executable, "-c", SERVE, str(home)],
        kinds=frozenset({"noop"}),
        seconds=120.0,
    ),
    "quantization": Scenario(
        submit=lambda home: submit_recipe(home, "qdiffusion-w4a8", (*SETTINGS, "passes.reconstruct.iterations=4")),
        serve=lambda home: [sys.executable, "-c", SERVE, str(home)],
        kinds=frozenset({"calibrate", "reference", "round", "reconstruct", "evaluate"}),
        seconds=600.0,
    ),
}


class Run:
    """A scenario in progress: its home, and the process that serves it."""

    def __init__(self, scenario: Scenario, home: Path) -> None:
        self.scenario = scenario
        self.home = home
        self.job_id = scenario.submit(home)
        self.database: Database = open_database(f"sqlite:///{home}/quantmill.db")
        self.log = home / "serve.log"
        self.seen: list[psutil.Process] = []
        self.server = self._serve()

    def _serve(self) -> psutil.Popen:
        with self.log.open("ab") as log:
            return psutil.Popen(self.scenario.serve(self.home), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def serve_again(self) -> None:
        """Start another orchestrator."""
        self.server = self._serve()

    def events(self) -> list[EventRow]:
        """Return the job's log."""
        with self.database.session(read_only=True) as session:
            return events(session, self.job_id, limit=100_000)

    def finished(self) -> set[str]:
        """Return the tasks that have finished."""
        return {str(each.task) for each in self.events() if each.event == "finished"}

    def family(self) -> list[psutil.Process]:
        """Return the orchestrator's process and all below it, and remember them."""
        found = [self.server, *self.server.children(recursive=True)]
        self.seen += found
        return found

    def wait_for(self, count: int) -> None:
        """Wait until so many tasks have finished."""
        deadline = time.monotonic() + self.scenario.seconds
        while len(self.finished()) < count:
            assert self.server.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for_end(self) -> JobRow:
        """Wait for the orchestrator to end; return the job."""
        try:
            code = self.server.wait(self.scenario.seconds)
        except psutil.TimeoutExpired:
            pytest.fail(self.log.read_text())
        assert code == 0, self.log.read_text()
        with self.database.session(read_only=True) as session:
            return find_job(session, self.job_id)

    def result(self) -> dict[str, str]:
        """Return the digests of what the job's last task stored."""
        return result_of(self.database, self.job_id)

    def close(self) -> None:
        """Stop what still runs."""
        if self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(30)
        self.database.close()


def result_of(database: Database, job_id: str) -> dict[str, str]:
    """Return the digests of what a job's last task stored."""
    with database.session(read_only=True) as session:
        job = find_job(session, job_id)
        outputs = find_task(session, job_id, str(job.target_task)).outputs
    assert outputs is not None
    return dict(outputs)


def kill_orchestrator(run: Run, chance: random.Random) -> None:
    """Kill the orchestrator; all of its Ray must go, too. Then start another."""
    family = run.family()
    run.server.kill()
    run.server.wait()
    assert_gone(family)
    run.serve_again()


def kill_worker(run: Run, chance: random.Random) -> None:
    """Kill a Ray worker in the middle of a task."""
    names = {f"ray::{kind}" for kind in run.scenario.kinds}
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        busy = [process for process in run.family() if name_of(process) in names]
        if busy:
            chance.choice(busy).kill()
            return
        time.sleep(0.005)
    pytest.fail("no worker was busy")


def kill_ray(run: Run, chance: random.Random) -> None:
    """Kill the whole of Ray, workers last."""
    parts = {"gcs_server": 0, "raylet": 1}
    victims = [process for process in run.family() if name_of(process) in parts or name_of(process).startswith("ray::")]
    assert len(victims) >= 2
    for process in sorted(victims, key=lambda each: parts.get(name_of(each), 2)):
        if process.is_running():
            process.kill()


VICTIMS = {"orchestrator": kill_orchestrator, "worker": kill_worker, "ray": kill_ray}


def name_of(process: psutil.Process) -> str:
    """Return a process's name; nothing if it is gone."""
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return ""


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until processes have ended; one that only its parent could clear away has."""
    deadline = time.monotonic() + 120
    left = processes
    while left and time.monotonic() < deadline:
        left = [process for process in left if process.is_running() and status_of(process) != psutil.STATUS_ZOMBIE]
        time.sleep(0.05)
    assert [name_of(process) for process in left] == []


def status_of(process: psutil.Process) -> str:
    """Return a process's status; that of one that ended if it is gone."""
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Return a scenario's result when nothing is killed; each scenario runs once for that, here and without Ray."""
    known: dict[str, dict[str, str]] = {}

    def result(name: str) -> dict[str, str]:
        if name not in known:
            home = tmp_path_factory.mktemp("undisturbed") / "home"
            job = SCENARIOS[name].submit(home)
            database = open_database(f"sqlite:///{home}/quantmill.db")
            config = SchedulerConfig(str(home / "store"), home / "cache", poll_seconds=0.1)
            Scheduler(database, InProcess, config).run(until_job=job)
            known[name] = result_of(database, job)
            database.close()
        return known[name]

    return result


def kill_points() -> list[Any]:
    """Four kill points for each victim and scenario; one of a worker in every run, the others in the slow ones."""
    always = {("noop", "worker", 0)}
    points = itertools.product(SCENARIOS, VICTIMS, range(4))
    return [
        pytest.param(*point, id="-".join(map(str, point)), marks=[] if point in always else [pytest.mark.slow])
        for point in points
    ]


@pytest.mark.parametrize(("name", "victim", "seed"), kill_points())
def test_killed_job_ends_as_if_nothing_had_happened(
    name: str, victim: str, seed: int, undisturbed: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    wanted = undisturbed(name)
    chance = random.Random(f"{victim} {seed}")
    run = Run(SCENARIOS[name], tmp_path / "home")
    try:
        with run.database.session(read_only=True) as session:
            total = job_counts(session, run.job_id)["total"]
        # Not among the last, so that something is left to disturb.
        run.wait_for(chance.randrange(total * 3 // 4))
        time.sleep(chance.uniform(0.0, 0.2))
        run.family()
        VICTIMS[victim](run, chance)
        had_finished, last = run.finished(), run.events()[-1].id
        job = run.wait_for_end()
        assert job.state == JobState.SUCCEEDED, job.error
        log = run.events()
        assert run.result() == wanted
        finishes = [each.task for each in log if each.event == "finished"]
        assert len(finishes) == len(set(finishes)), "a task finished twice"
        again = {each.task for each in log if each.event == "claimed" and each.id > last} & had_finished
        assert again == set(), "a task that had finished ran again"
        assert any(each.event in ("retried", "expired") for each in log), "nothing was disturbed"
        assert_gone(run.seen)
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["learned", "frozen"])
def test_distillation_goes_on_where_a_killed_worker_left_it(tmp_path: Path, codes: str) -> None:
    settings = (*SETTINGS, *DISTILL, f"passes.distill.codes={codes}")
    scenario = replace(
        SCENARIOS["quantization"],
        submit=lambda home: submit_recipe(home, "mpqdm-w4a4", settings),
        kinds=frozenset({"distill"}),
    )
    run = Run(scenario, tmp_path / "home")
    notes = tmp_path / "home" / "store" / "notes"
    try:
        wait_until(lambda: any((notes / "checkpoint").glob("*")), run)
        kill_worker(run, random.Random(0))
        wait_until(lambda: began_later(run), run)
        job = run.wait_for_end()
        assert job.state == JobState.SUCCEEDED, job.error
        assert any(each.event in ("retried", "expired") for each in run.events())
        assert [path for path in notes.rglob("*") if path.is_file()] == []
        with run.database.session(read_only=True) as session:
            (task,) = list_tasks(session, job.id, kind="distill")
            params, inputs = session.execute(select(Task.params, Task.inputs).where(Task.id == task.id)).one()
        store, cache = str(run.home / "store"), str(tmp_path / "cache")
        assert execute_call(TaskCall("distill", params, inputs, store, cache)).outputs == task.outputs
    finally:
        run.close()


def began_later(run: Run) -> bool:
    """Whether an attempt of the distillation that runs now began after its first iteration."""
    with run.database.session(read_only=True) as session:
        (task,) = list_tasks(session, run.job_id, kind="distill")
    progress = read_progress(open_store(str(run.home / "store")), str(task.key))
    return progress is not None and progress.first > 0


def wait_until(what: Callable[[], bool], run: Run) -> None:
    """Wait until something is so, while the orchestrator runs."""
    deadline = time.monotonic() + run.scenario.seconds
    while not what():
        assert run.server.poll() is None, run.log.read_text()
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.05)
