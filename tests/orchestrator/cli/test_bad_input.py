"""What bad input gets: one line that says what, got and wanted, exit code 2, and nothing changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.db.models import REVISIONS
from orchestrator.db.releases import publish
from orchestrator.db.session import open_database
from workers.storage.manifest import put_tree
from workers.storage.store import open_store

ROOT = Path(__file__).parents[3]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

Cli = Callable[..., Any]
Snapshot = Callable[[], dict[str, bytes]]


def assert_refused(answer: Any, *words: str) -> None:
    """Check for exit code 2, an empty stdout, and one line on stderr with these words."""
    assert (answer.code, answer.out) == (2, ""), answer
    lines = answer.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in lines[-1], lines[-1]


@pytest.fixture
def model(digits: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be damaged."""
    return shutil.copytree(digits, tmp_path / "model")


def test_unknown_recipe_key_names_the_nearest(cli: Cli, with_digits: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: fast-w4a8\nweights:\n  bitss: 4\n")
    before = snapshot()
    for words in (["recipes", "validate", recipe], ["submit", recipe, "--model", "digits"]):
        assert_refused(cli(*words), "bitss", "bits")
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--set", "wieghts.bits=4"), "wieghts", "weights")
    assert_refused(cli("submit", "fast-w4a9", "--model", "digits"), "fast-w4a9", "fast-w4a8")
    assert snapshot() == before


@pytest.mark.parametrize("bits", ["1", "9", "16", "0", "-4", "4.5"])
def test_bits_outside_2_to_8(cli: Cli, with_digits: Path, snapshot: Snapshot, bits: str) -> None:
    before = snapshot()
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--set", f"weights.bits={bits}")
    assert_refused(answer, "weights.bits", bits, "2", "8")
    assert snapshot() == before


def test_fields_that_nothing_reads(cli: Cli, with_digits: Path, snapshot: Snapshot) -> None:
    before = snapshot()
    words = ["submit", "minmax-w8a8", "--model", "digits", "--set"]
    assert_refused(cli(*words, "passes.round.damping=0.5"), "passes.round.damping", "got 0.5", "method closed_form")
    assert_refused(cli(*words, "sampler.mu=0.5"), "sampler.mu", "got 0.5", "wanted null", "DDIMScheduler")
    assert_refused(cli(*words, "sampler.null_class=3"), "sampler.null_class", "got 3", "wanted null")
    assert snapshot() == before


def test_budget_that_no_allocation_can_meet(cli: Cli, with_digits: Path, snapshot: Snapshot) -> None:
    before = snapshot()
    words = ["submit", "fast-w4a8", "--model", "digits", "--dry-run", "--set"]
    refused = cli(*words, "budget.weight_bits_mean=4")
    assert_refused(refused, "budget.weight_bits_mean", "got 4", "wanted at least 4.", "smallest")
    smallest = refused.err.partition("at least ")[2].split()[0]
    assert cli(*words, f"budget.weight_bits_mean={smallest}").code == 0
    assert cli(*words, f"budget.weight_bits_mean={float(smallest) - 0.01}").code == 2
    assert snapshot() == before


def test_model_folder_without_config(cli: Cli, model: Path, snapshot: Snapshot) -> None:
    cli("init")
    (model / "unet" / "config.json").unlink()
    before = snapshot()
    for words in (
        ["models", "add", model],
        ["submit", "fast-w4a8", "--model", model],
        ["run", "fast-w4a8", "--model", model],
    ):
        assert_refused(cli(*words), "config.json", str(model))
    assert snapshot() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(cli: Cli, model: Path, snapshot: Snapshot, value: float) -> None:
    cli("init")
    tensors = load_file(model / WEIGHTS)
    tensors["conv_in.weight"][1, 0, 2, 1] = value
    save_file(tensors, model / WEIGHTS)
    before = snapshot()
    assert_refused(cli("models", "add", model), "conv_in.weight")
    assert snapshot() == before


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_safetensors(cli: Cli, model: Path, snapshot: Snapshot, kept: int) -> None:
    cli("init")
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:kept])
    before = snapshot()
    assert_refused(cli("models", "add", model), "diffusion_pytorch_model.safetensors")
    assert snapshot() == before


def test_model_names_that_are_not(cli: Cli, digits: Path, snapshot: Snapshot) -> None:
    cli("init")
    before = snapshot()
    for name in ("Capital", "../climb", "", "a" * 129, ".hidden"):
        assert_refused(cli("models", "add", digits, "--name", name), "name")
    assert snapshot() == before


def test_release_names_that_are_not(cli: Cli, with_digits: Path, snapshot: Snapshot) -> None:
    before = snapshot()
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--name", "Not/AName"), "Not/AName")
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--priority", str(2**40)), "priority")
    assert snapshot() == before


@pytest.fixture
def release(cli: Cli, with_digits: Path, tmp_path: Path) -> str:
    """A release `thing@1` of a small folder, and its manifest's digest."""
    folder = tmp_path / "thing"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    digest = put_tree(open_store(str(with_digits / "store")), folder)
    job = cli("submit", "fast-w4a8", "--model", "digits", "--json").json["job"]
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    with database.session() as session:
        publish(session, "thing", digest, 102_400, job=job, metrics={})
    database.close()
    return digest


def blob_of(home: Path, digest: str, path: str) -> Path:
    """Return the store's file that holds one file of a release."""
    store = home / "store" / "sha256"
    manifest = json.loads((store / digest[:2] / digest).read_text())
    blob = manifest["files"][path]["sha256"]
    return store / blob[:2] / blob


def test_digest_mismatch_on_pull(cli: Cli, release: str, home: Path, tmp_path: Path, snapshot: Snapshot) -> None:
    assert cli("artifacts", "pull", "thing@1", tmp_path / "good").code == 0
    pulled = {path.name for path in (tmp_path / "good").iterdir()}
    assert pulled == {"config.json", "weights.safetensors", "scheduler", "manifest.json"}
    blob = blob_of(home, release, "weights.safetensors")
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    beside, before = sorted(tmp_path.iterdir()), snapshot()
    assert_refused(cli("artifacts", "pull", "thing@1", tmp_path / "bad"), blob.name)
    assert sorted(tmp_path.iterdir()) == beside
    assert snapshot() == before
    verified = cli("artifacts", "verify", "thing@1", "--json")
    assert (verified.code, verified.json["ok"]) == (2, False)
    assert "weights.safetensors" in verified.json["problems"][0]


def test_pull_does_not_touch_what_is_there(cli: Cli, release: str, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "note.txt").write_text("keep")
    assert_refused(cli("artifacts", "pull", "thing@1", target), str(target), "empty")
    assert [path.name for path in target.iterdir()] == ["note.txt"]
    assert_refused(cli("artifacts", "pull", "thing@1", tmp_path / "no" / "where"), "there is no")
    assert_refused(cli("run", "fast-w4a8", "--model", "digits", "--out", target), str(target))


def test_database_ahead_of_the_code(cli: Cli, with_digits: Path, snapshot: Snapshot) -> None:
    with sqlite3.connect(with_digits / "quantmill.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '2099.1.0'")
    connection.close()
    before = snapshot()
    for words in (["jobs", "ls"], ["init"], ["db", "upgrade"], ["run", "fast-w4a8", "--model", "digits"]):
        assert_refused(cli(*words), "2099.1.0", REVISIONS[-1])
    assert snapshot() == before


def test_database_behind_the_code(
    cli: Cli, with_digits: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the next release of the code will see in a home of today.
    monkeypatch.setattr("orchestrator.db.session.REVISIONS", (*REVISIONS, "2099.1.0"))
    before = snapshot()
    for words in (["jobs", "ls"], ["init"], ["submit", "fast-w4a8", "--model", "digits"]):
        assert_refused(cli(*words), REVISIONS[-1], "2099.1.0", "quantmill db upgrade")
    assert snapshot() == before


def test_database_that_is_none(cli: Cli, home: Path) -> None:
    home.mkdir()
    (home / "quantmill.db").write_bytes(b"this is not a database" * 100)
    assert_refused(cli("jobs", "ls"), "quantmill.db")
    assert_refused(cli("--db", f"sqlite:///{home / 'missing.db'}", "jobs", "ls"), "missing.db", "quantmill init")
    assert not (home / "missing.db").exists()
    assert_refused(cli("--db", "mysql://somewhere/x", "jobs", "ls"), "mysql", "postgresql")
    assert_refused(cli("--db", "postgresql://127.0.0.1:1/x", "jobs", "ls"), "127.0.0.1")


def test_home_that_cannot_be_made(cli: Cli, home: Path) -> None:
    home.write_text("a file")
    assert_refused(cli("jobs", "ls"), str(home))


def test_store_that_cannot_be_reached(
    cli: Cli, home: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("init")
    before = sqlite_dump(home)
    assert_refused(cli("--store", tmp_path / "nowhere", "models", "add", digits), "nowhere")
    assert_refused(cli("--store", "ftp://somewhere/x", "models", "add", digits), "ftp://somewhere/x", "s3://")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert_refused(cli("--store", "s3://bucket/prefix", "models", "add", digits), "s3://bucket/prefix")
    assert sqlite_dump(home) == before
    assert not (tmp_path / "nowhere").exists()


def sqlite_dump(home: Path) -> list[str]:
    """Return every row of a home's database."""
    with sqlite3.connect(home / "quantmill.db") as connection:
        rows = list(connection.iterdump())
    connection.close()
    return rows


SMALL_DISK = """
mount -t tmpfs -o size={size} quantmill "$1" || exit 77
shift
"$@"
code=$?
find "$0" | sort
exit $code
"""


def on_a_small_disk(folder: Path, size: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the command line where `folder` is a file system of that size; afterwards its files are listed on stdout."""
    folder.mkdir()
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    script = SMALL_DISK.format(size=size)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUANTMILL")}
    run = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", script, str(folder), str(folder), *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if run.returncode == 77 or "unshare" in run.stderr:
        pytest.skip(f"no small file system can be mounted here: {run.stderr.strip()}")
    return run


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_full_disk_under_the_store(digits: Path, tmp_path: Path, home: Path) -> None:
    # There is room for the database, but not for the weights, which are 1.8 MB.
    disk = tmp_path / "disk"
    run = on_a_small_disk(disk, "1m", "--home", disk / "home", "models", "add", digits)
    assert run.returncode == 2, run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "no room left" in run.stderr
    left = [line for line in run.stdout.splitlines() if "/partial/" in line or "model.safetensors" in line]
    assert left == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
@pytest.mark.parametrize("size", ["16k", "100k"])
def test_full_disk_under_the_database(tmp_path: Path, home: Path, size: str) -> None:
    disk = tmp_path / "disk"
    run = on_a_small_disk(disk, size, "--home", disk / "home", "jobs", "ls")
    assert run.returncode == 2, run.stderr
    assert "no room left" in run.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_full_disk_under_a_pull(cli: Cli, release: str, with_digits: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    run = on_a_small_disk(disk, "64k", "--home", with_digits, "artifacts", "pull", "thing@1", disk / "target")
    assert run.returncode == 2, run.stderr
    assert "no room left" in run.stderr
    assert run.stdout.splitlines() == [str(disk)]


def test_files_that_may_not_grow(digits: Path, tmp_path: Path, home: Path) -> None:
    """A limit on the size of files (ulimit -f) is another way of the system to say that there is no room."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "--home",
        str(tmp_path / "limited"),
        "models",
        "add",
        str(digits),
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit, check=False)
    assert run.returncode == 2, run.stderr
    assert "no room left" in run.stderr
    stored = [path for path in (tmp_path / "limited" / "store").rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 600_000 for path in stored)
    assert not list((tmp_path / "limited" / "store" / "partial").glob("*"))
