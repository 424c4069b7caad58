"""What lies in a home is for its owner alone, whatever the umask, and what an older release made wider is noticed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.actions.doctor import _home, _ray
from orchestrator.settings import resolve_settings
from workers.storage.cache import CachedStore
from workers.storage.locks import own_folder
from workers.storage.store import open_store

Cli = Callable[..., Any]


@pytest.fixture(params=[0o000, 0o022], ids=["umask000", "umask022"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run a test once with each umask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_home_is_made_for_its_owner_alone(cli: Cli, home: Path, umask: int) -> None:
    assert cli("init").code == 0
    assert cli("models", "ls").code == 0
    for folder in (home, home / "store"):
        assert mode_of(folder) == 0o700, folder
    # What lies in the store is behind a folder that nobody else may enter.
    files = [path for path in home.rglob("*") if path.is_file() and home / "store" not in path.parents]
    assert home / "quantmill.db" in files
    assert {mode_of(path) for path in files} == {0o600}


def test_a_home_that_a_first_use_makes_is_as_private(cli: Cli, home: Path, umask: int) -> None:
    assert cli("jobs", "ls").code == 0
    assert {mode_of(home), mode_of(home / "store")} == {0o700}
    assert mode_of(home / "quantmill.db") == 0o600


def test_caches_and_scratch_on_any_node_are_private(tmp_path: Path, umask: int) -> None:
    cache = tmp_path / "node" / "cache"
    (tmp_path / "store").mkdir()
    store = CachedStore(open_store(str(tmp_path / "store")), cache, 1 << 20)
    store.put_bytes(b"a")
    with own_folder(cache / "scratch") as scratch:
        folders = [scratch, *(path for path in (tmp_path / "node").rglob("*") if path.is_dir())]
        assert {mode_of(folder) for folder in (tmp_path / "node", *folders)} == {0o700}


def test_a_wider_home_is_said_by_the_doctor_and_mended_by_init(cli: Cli, home: Path) -> None:
    cli("init")
    home.chmod(0o755)
    (home / "quantmill.db").chmod(0o644)

    # One check alone: all of them start a Python with torch.
    settings = resolve_settings({}, home=str(home))
    ok, detail = _home(settings)
    assert not ok
    assert "quantmill init" in detail
    assert cli("jobs", "ls").code == 0
    assert mode_of(home) == 0o755, "a use of it is no decision"
    assert cli("init").code == 0
    assert (mode_of(home), mode_of(home / "quantmill.db")) == (0o700, 0o600)
    assert _home(settings)[0]


def test_a_store_that_others_may_share_is_as_the_umask_says(cli: Cli, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        assert cli("--store", tmp_path / "shared", "init").code == 0
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "shared") == 0o775


def test_a_token_that_others_may_read_is_refused_by_the_doctor(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o644)
    environ = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ok, detail = _ray("10.0.0.1:6379", environ)
    assert not ok
    assert f"chmod 600 {token}" in detail
    token.chmod(0o600)
    assert _ray("10.0.0.1:6379", environ)[0]
