"""Homes, databases and stores whose paths mean something in URLs: each file lies where the path says."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli

Cli = Callable[..., Any]

ROOT = Path(__file__).parents[3]
NAMES = ["job_feature%2Flogin", "plain # & ü", "what?mode=ro", "me@host:1", "100%", "%%20 +"]


@pytest.fixture(params=NAMES)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with an odd name, which is there."""
    folder = tmp_path / str(request.param)
    folder.mkdir()
    return folder


def files_of(folder: Path) -> set[str]:
    """Return the files below a folder, but for those that SQLite makes and removes as it likes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)) for path in paths}


def rows_of(database: Path) -> int:
    """Return how many tables a SQLite file has."""
    with sqlite3.connect(database) as connection:
        count: int = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
    connection.close()
    return count


def test_the_home_is_where_its_path_says(cli: Cli, odd: Path, tmp_path: Path) -> None:
    answer = cli("--home", odd, "init", "--json")
    assert answer.code == 0, answer.err
    assert files_of(tmp_path) == {f"{odd.name}/quantmill.db", f"{odd.name}/store/quantmill.json"}
    assert (odd / "store").is_dir()
    assert rows_of(odd / "quantmill.db") > 5
    assert (answer.json["home"], answer.json["store"]) == (str(odd), str(odd / "store"))
    # What is shown is a URL, and means the same when it is given.
    assert cli("--db", answer.json["database"], "db", "current", "--json").json["current"] is True
    assert files_of(tmp_path) == {f"{odd.name}/quantmill.db", f"{odd.name}/store/quantmill.json"}


def test_a_given_database_and_store_are_where_their_paths_say(cli: Cli, odd: Path, tmp_path: Path, home: Path) -> None:
    url = cli("--home", odd, "init", "--json").json["database"].replace("quantmill.db", "other.db")
    words = ["--db", url, "--store", odd / "blobs"]
    assert cli(*words, "init").code == 0
    of_home = {f"{odd.name}/{name}" for name in ("quantmill.db", "store/quantmill.json")}
    assert files_of(tmp_path) == of_home | {f"{odd.name}/other.db", f"{odd.name}/blobs/quantmill.json"}
    assert (odd / "blobs").is_dir()
    assert not (home / "store").exists()
    assert cli(*words, "jobs", "ls", "--json").json == []


def test_a_model_and_the_checks_find_their_way(digits: Path, tmp_path: Path, cli: Cli) -> None:
    odd = tmp_path / "feature%2Flogin #1?x ü@y"
    model = shutil.copytree(digits, odd / "a%20model")
    words = ["--home", odd / "home", "--store", odd / "blobs"]
    assert cli(*words, "init").code == 0
    added = cli(*words, "models", "add", model, "--json")
    assert added.code == 0, added.err
    assert (added.json["name"], added.json["source"]) == ("a-20model", str(model))
    checks = {each["name"]: each for each in cli(*words, "doctor", "--json").json["checks"]}
    assert checks["database"]["ok"]
    assert checks["store"] == {
        "name": "store",
        "ok": True,
        "detail": f"{odd / 'blobs'}: writes, reads and deletes; it belongs to this database",
    }
    # The inspecting task ran in a process of its own, with scratch in the home's cache.
    assert (odd / "home" / "cache").is_dir()
    blobs = {path for path in files_of(odd) if path.startswith("blobs/sha256/")}
    assert len(blobs) >= 4
    own = {"home/quantmill.db", "blobs/quantmill.json"}
    assert files_of(odd) - blobs <= {f"a%20model/{path}" for path in files_of(model)} | own | {
        path for path in files_of(odd) if path.startswith("home/cache/")
    }


def test_quantmill_itself_may_be_installed_at_an_odd_path(tmp_path: Path, home: Path) -> None:
    site = tmp_path / "workspace%2Fmain %(here)s"
    for package in ("quant_spec", "workers", "orchestrator", "migrations"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "--home", str(home), "init"],
        capture_output=True,
        text=True,
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rows_of(home / "quantmill.db") > 5


def test_a_cache_lies_in_its_odd_home(
    tmp_path: Path, digits: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "cache%2F of #1?"
    monkeypatch.setenv("QUANTMILL_STORE", f"{s3_url}/odd #%2F?")
    assert run_cli(["--home", str(odd), "models", "add", str(digits)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]
    assert len(list((odd / "cache" / "sha256").glob("??/*"))) >= 3
