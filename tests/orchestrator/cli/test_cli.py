"""The command line without anything being computed: options, answers, exit codes."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest

from orchestrator.actions.live import LinePace, Pace
from orchestrator.actions.probe import run_python
from orchestrator.actions.progress import (
    Snapshot,
    Width,
    progress_line,
    remaining_seconds,
    seconds_left,
    show_progress,
)
from orchestrator.actions.registration import default_model_name
from orchestrator.actions.submission import default_release_name
from orchestrator.cli.main import COMMANDS
from orchestrator.cli.main import cli as root_command
from orchestrator.db.rows import KindRow
from orchestrator.db.session import open_database
from orchestrator.planning.estimate import Rate
from orchestrator.scheduling.running import RunningTask
from orchestrator.settings import resolve_settings
from quant_spec.errors import InvalidInputError
from workers.execution.notes import TaskProgress
from workers.storage.names import check_name
from workers.storage.store import open_store

Cli = Callable[..., Any]

ROOT = Path(__file__).parents[3]


def quantmill(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Call the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        **kwargs,
    )


def test_help_names_the_commands() -> None:
    answer = quantmill("--help")
    assert answer.returncode == 0
    assert all(name in answer.stdout for name in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.cli.main import run_cli; run_cli(['--help']);"
        "heavy = {'sqlalchemy', 'ray', 'boto3', 'torch', 'numpy', 'pydantic', 'rich', 'jinja2'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr


def test_no_command_imports_torch_or_ray() -> None:
    modules = {target.partition(":")[0] for target, _ in COMMANDS.values()}
    code = (
        f"import sys, {', '.join(sorted(modules))};"
        "heavy = {'torch', 'diffusers', 'ray', 'boto3', 'huggingface_hub'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Return every command below a group by its words."""
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= all_commands(command, (*path, name))
        else:
            found[*path, name] = command
    return found


def test_commands_are_those_of_the_contract() -> None:
    words = {" ".join(path) for path in all_commands(root_command)}
    groups = {
        "": "init doctor run submit serve bench report",
        "db": "upgrade current",
        "models": "add ls show",
        "recipes": "ls show validate",
        "jobs": "ls show logs wait cancel retry",
        "artifacts": "ls show pull verify sign alias diff gc export",
        "search": "run submit ls show pareto report sensitivity cancel extend",
    }
    assert words == {f"{group} {name}".strip() for group, names in groups.items() for name in names.split()}


def test_every_command_takes_json_and_has_help() -> None:
    for path, command in all_commands(root_command).items():
        assert any("--json" in parameter.opts for parameter in command.params), path
        assert command.help, path


@pytest.mark.parametrize(
    "words", [("--json", "db", "current"), ("db", "--json", "current"), ("db", "current", "--json")]
)
def test_json_goes_before_or_after_the_name(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli(*words)
    assert (answer.code, answer.err) == (0, "")
    assert answer.json == {"revision": None, "head": answer.json["head"], "current": False}


def test_usage_errors_exit_2(cli: Cli) -> None:
    for words in (["nonsense"], ["jobs", "show"], ["submit", "fast-w4a8"], ["jobs", "ls", "--state", "asleep"]):
        answer = cli(*words)
        assert (answer.code, answer.out) == (2, ""), words


def test_first_use_makes_the_home(cli: Cli, home: Path) -> None:
    answer = cli("jobs", "ls", "--json")
    assert answer.json == []
    assert (home / "quantmill.db").is_file()
    assert (home / "store").is_dir()


def test_init_is_idempotent(cli: Cli, home: Path, snapshot: Callable[[], dict[str, bytes]]) -> None:
    first = cli("init", "--json")
    before = snapshot()
    second = cli("init", "--json")
    assert first.code == second.code == 0
    assert first.json == second.json
    assert first.json["home"] == str(home)
    assert snapshot() == before


def test_settings_come_from_options_then_environment_then_defaults(tmp_path: Path) -> None:
    given = {"QUANTMILL_HOME": str(tmp_path / "env"), "QUANTMILL_STORE": "s3://bucket/prefix", "RAY_ADDRESS": ""}
    settings = resolve_settings(given, home=str(tmp_path / "flag"))
    assert settings.home == tmp_path / "flag"
    assert settings.store_url == "s3://bucket/prefix"
    assert not settings.embedded_store
    assert settings.database_url.reveal() == f"sqlite:///{tmp_path / 'flag' / 'quantmill.db'}"
    assert settings.embedded_database
    assert settings.ray_address is None
    assert settings.cache_bytes == 20 * 2**30
    assert resolve_settings({"QUANTMILL_CACHE_GIB": "0.5"}).cache_bytes == 2**29
    for size in ("much", "0", "-1", "inf", "nan"):
        with pytest.raises(InvalidInputError, match="QUANTMILL_CACHE_GIB"):
            resolve_settings({"QUANTMILL_CACHE_GIB": size})


@pytest.mark.postgres
def test_a_postgres_database_is_upgraded_only_when_asked(
    cli: Cli, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE cli_test")
    server, question, query = postgres_url.partition("?")
    monkeypatch.setenv("QUANTMILL_DB", f"{server.rsplit('/', 1)[0]}/cli_test{question}{query}")
    refused = cli("jobs", "ls")
    assert refused.code == 2
    assert "no schema" in refused.err
    assert cli("db", "upgrade", "--json").json["current"] is True
    assert cli("jobs", "ls", "--json").json == []


def test_doctor_finds_nothing_wrong(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("init")
    # A new process, not a warm one: it must not import from the current folder.
    monkeypatch.setattr("orchestrator.actions.doctor.run_python", run_python)
    (tmp_path / "queue.py").write_text("raise RuntimeError('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    answer = cli("doctor", "--json")
    assert (answer.code, answer.json["ok"]) == (0, True), answer.out
    names = [check["name"] for check in answer.json["checks"]]
    names_of = [
        "python",
        "torch",
        "kernels",
        "gpu",
        "ray",
        "database",
        "orchestrators",
        "store",
        "home",
        "disk",
        "nodes",
    ]
    assert names == names_of


def test_doctor_names_what_is_wrong(cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "kernels-0.17.2.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("QUANTMILL_STORE", str(tmp_path / "nowhere"))
    answer = cli("doctor", "--json")
    bad = {check["name"]: check["detail"] for check in answer.json["checks"] if not check["ok"]}
    assert answer.code == 1
    assert set(bad) == {"kernels", "ray", "store"}
    assert "pip uninstall kernels" in bad["kernels"]
    assert "RAY_AUTH_MODE=token" in bad["ray"]


def test_recipes(cli: Cli, tmp_path: Path) -> None:
    listed = cli("recipes", "ls", "--json").json
    assert {"minmax-w8a8", "qdiffusion-w8a8", "qdiffusion-w4a8", "fast-w4a8"} <= {each["name"] for each in listed}
    shown = cli("recipes", "show", "fast-w4a8", "--set", "weights.bits=5", "--json").json
    assert shown["recipe"]["weights"]["bits"] == 5
    text = cli("recipes", "show", "fast-w4a8").out
    own = tmp_path / "own.yaml"
    own.write_text(text)
    validated = cli("recipes", "validate", own, "--json")
    assert validated.code == 0
    assert validated.json["digest"] == next(each["digest"] for each in listed if each["name"] == "fast-w4a8")


def test_models(cli: Cli, with_digits: Path, digits: Path, tmp_path: Path) -> None:
    row = cli("models", "show", "digits", "--json").json
    assert row["class_name"] == "UNet2DModel"
    assert row["inspection"]["units"]
    again = cli("models", "add", digits, "--json")
    assert again.json["digest"] == row["digest"]
    elsewhere = shutil.copytree(digits, tmp_path / "Another Folder!")
    assert cli("models", "add", elsewhere, "--json").json["name"] == "digits"
    assert cli("models", "add", elsewhere, "--name", "second", "--json").json["digest"] == row["digest"]
    assert [model["name"] for model in cli("models", "ls", "--json").json] == ["digits", "second"]
    assert cli("models", "show", row["digest"][:8], "--json").json["digest"] == row["digest"]
    assert cli("models", "show", "nothing").code == 102


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("examples/models/emoji32", "emoji32"),
        ("/a/Another Folder!/", "another-folder"),
        ("hf:Owner/Some_Model.v2@main", "some_model.v2"),
        ("/a/___", "model"),
        ("/a/" + "x" * 200, "x" * 119),
    ],
)
def test_default_model_names_are_names(source: str, name: str) -> None:
    assert default_model_name(source) == check_name(name)


def test_release_names_are_names() -> None:
    assert default_release_name("emoji32", "fast-w4a8") == "emoji32-fast-w4a8"
    assert len(check_name(default_release_name("m" * 128, "r" * 128))) == 128


def test_dry_run_queues_nothing(
    cli: Cli, with_digits: Path, snapshot: Callable[[], dict[str, bytes]], tmp_path: Path, digits: Path
) -> None:
    before = snapshot()
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--dry-run", "--json")
    assert answer.code == 0
    assert answer.json["tasks"]["total"] == sum(kind["total"] for kind in answer.json["kinds"].values())
    assert answer.json["tasks"]["cached"] == 0
    assert answer.json["estimated_seconds"] > 0
    assert answer.json["peak_memory_bytes"] > 2**30
    elsewhere = shutil.copytree(digits, tmp_path / "copy")
    text = cli("submit", "fast-w4a8", "--model", elsewhere, "--dry-run")
    assert "estimated time" in text.out
    assert snapshot() == before


def test_a_job_is_queued_shown_cancelled_and_retried(cli: Cli, with_digits: Path) -> None:
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--priority", "3", "--json")
    job = answer.json["job"]
    assert answer.json == {"job": job, "state": "queued"}
    assert f"jobs logs -f {job}" in answer.err
    shown = cli("jobs", "show", job[:6], "--json").json
    keys = {"job", "state", "model", "recipe", "tasks", "seconds", "release", "digest", "metrics", "error"}
    assert keys <= set(shown)
    assert set(shown["tasks"]) == {"total", "cached", "succeeded", "failed", "running", "queued"}
    assert shown["tasks"]["queued"] == shown["tasks"]["total"] > 0
    assert (shown["model"], shown["recipe"], shown["release"]) == ("digits", "fast-w4a8", None)
    assert [row["job"] for row in cli("jobs", "ls", "--state", "queued", "--json").json] == [job]
    waited = cli("jobs", "wait", job, "--timeout", "0.1", "--json")
    assert (waited.code, waited.json["state"]) == (101, "queued")
    assert cli("jobs", "cancel", job, "--json").json["state"] == "cancelled"
    assert cli("jobs", "wait", job).code == 103
    assert cli("jobs", "ls", "--state", "queued", "--json").json == []
    events = [event["event"] for event in cli("jobs", "logs", "-f", job, "--json").json]
    assert events[0] == "created"
    assert events[-1] == "cancelled"
    lines = cli("jobs", "logs", job).out.splitlines()
    assert len(lines) == len(events)
    assert cli("jobs", "retry", job, "--json").json["state"] == "queued"
    assert cli("jobs", "show", "ffffffffffff").code == 102


def test_logs_follow_until_the_job_ends(cli: Cli, with_digits: Path) -> None:
    job = cli("submit", "fast-w4a8", "--model", "digits", "--json").json["job"]
    command = [sys.executable, "-u", "-m", "orchestrator.cli", "--home", str(with_digits), "jobs", "logs", "-f", job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as follower:
        assert follower.stdout is not None
        assert "created" in follower.stdout.readline()
        assert cli("jobs", "cancel", job).code == 0
        rest = follower.stdout.read()
        assert follower.wait(20) == 0
    assert "cancelled" in rest.splitlines()[-1]


def test_submit_registers_a_folder(cli: Cli, with_digits: Path, digits: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(digits, tmp_path / "copy")
    answer = cli("submit", "minmax-w8a8", "--model", elsewhere, "--name", "mine", "--json")
    job = answer.json["job"]
    assert cli("jobs", "show", job, "--json").json["model"] == "digits"
    assert cli("submit", "minmax-w8a8", "--model", "nothing").code == 102


def test_no_releases_yet(cli: Cli) -> None:
    assert cli("artifacts", "ls", "--json").json == []
    for words in (["show", "x@1"], ["pull", "x@1", "here"], ["verify", "x"], ["alias", "x", "prod"]):
        assert cli("artifacts", *words).code == 102, words


def kind(name: str, total: int, cached: int, done: int, seconds: float, work: float, left: float) -> KindRow:
    """Return a row of progress; `done` tasks were computed, one more runs if any is left."""
    rest = total - cached - done
    running = min(rest, 1)
    return KindRow(name, total, cached, cached + done, 0, 0, running, rest - running, seconds, work, left)


def test_remaining_time_prefers_the_jobs_own_times_once_they_tell() -> None:
    kinds = [
        kind("calibrate", 4, 2, 1, 10.0, 5.0, 5.0),
        kind("reconstruct", 9, 0, 1, 60.0, 0.1, 50.0),
        kind("round", 2, 0, 0, 0.0, 0.0, 8.0),
    ]
    rates = {name: Rate(0.5, 2.0) for name in ("calibrate", "round", "reconstruct")}
    own, first_was_small, none_yet = 10.0, 8 * 0.5 + 100.0, 2 * 0.5 + 16.0
    assert remaining_seconds(kinds, rates, Width(2)) == pytest.approx((own + first_was_small + none_yet) / 2)


def test_remaining_time_is_shorter_where_gpus_take_what_gains_by_them() -> None:
    kinds = [kind("calibrate", 8, 0, 0, 0.0, 0.0, 80.0), kind("pack", 4, 0, 0, 0.0, 0.0, 8.0)]
    rates = {"calibrate": Rate(0.0, 1.0), "pack": Rate(0.0, 1.0)}
    nodes = [{"cpus": 2.0, "gpus": 2, "gpu_tasks": 8, "left_out": None}, {"cpus": 9.0, "gpus": 9, "left_out": "old"}]
    width = Width.of({"nodes": nodes}, 1)
    assert remaining_seconds(kinds, rates, width) == pytest.approx(80 / 8 + 8 / 2)
    assert remaining_seconds(kinds, rates, Width.of({}, 2)) == pytest.approx(88 / 2)


def test_what_a_long_task_says_counts_instead_of_its_estimate() -> None:
    kinds = [kind("distill", 1, 0, 0, 0.0, 0.0, 36_000.0), kind("evaluate", 8, 0, 0, 0.0, 0.0, 2_000.0)]
    rates = {"distill": Rate(0.0, 0.03), "evaluate": Rate(1.0, 0.03)}
    evaluations = (8 * 1.0 + 2_000 * 0.03) / 2
    told = [RunningTask("distill", "", TaskProgress(1199, 1200, 0, 1199.0))]
    assert seconds_left(kinds, rates, Width(2), told) == pytest.approx(1.0 + evaluations)
    silent = [RunningTask("distill", "", TaskProgress(0, 1200, 0, 0.0))]
    assert seconds_left(kinds, rates, Width(2), silent) == pytest.approx(36_000 * 0.03 / 2 + evaluations)


def snapshot_of(done: int, total: int, state: str = "running") -> Snapshot:
    """Return the progress of a job of one kind."""
    return Snapshot("abc", state, "digits", "fast", (kind("round", total, 0, done, 1.0, 1.0, 1.0),), 3.0, 60.0)


def test_lines_of_progress_are_no_flood() -> None:
    pace = LinePace()
    due = [pace.is_due(snapshot_of(done, 10_000), done / 10, last=False) for done in range(2_000)]
    assert due[0]
    assert sum(due) <= 30
    assert pace.is_due(snapshot_of(10_000, 10_000, "succeeded"), 201.0, last=True)
    assert not pace.is_due(snapshot_of(10_000, 10_000, "succeeded"), 500.0, last=True)


def test_progress_line_says_what_runs_and_what_is_left() -> None:
    assert (
        progress_line(snapshot_of(3, 8))
        == "job abc: running 3/8 tasks; running round 3/8; 3.0 s; about 1 min 00 s left"
    )
    assert progress_line(snapshot_of(8, 8, "succeeded")) == "job abc: succeeded 8/8 tasks; 3.0 s"
    long = replace(snapshot_of(3, 8), steps=(RunningTask("distill", "", TaskProgress(300, 1200, 100, 50.0)),))
    assert "; distill at step 300/1200, about 3 min 45 s left; " in progress_line(long)


def test_pace_is_over_the_last_minute() -> None:
    pace = Pace()
    for second in range(0, 200, 10):
        pace.add(float(second), second if second > 100 else 0)
    assert pace.per_second() == pytest.approx((190 - 130) / 60)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "live"])
def test_progress_shows_a_job_while_the_block_runs(cli: Cli, with_digits: Path, stream: io.StringIO) -> None:
    job = cli("submit", "fast-w4a8", "--model", "digits", "--json").json["job"]
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    with show_progress(database, open_store(str(with_digits / "store")), job, workers=2, stream=stream):
        time.sleep(1.5)
        cli("jobs", "cancel", job)
    database.close()
    text = stream.getvalue()
    assert job in text
    assert "cancelled" in text
    if isinstance(stream, Terminal):
        assert "fast-w4a8 on digits" in text
        assert "calibrate" in text
        assert "\x1b[" in text
    else:
        assert [line.split(":")[1].split()[0] for line in text.splitlines()] == ["queued", "cancelled"]
