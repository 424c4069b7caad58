"""The command line as a user calls it, on a fresh home of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import run_cli
from tests.orchestrator.in_process import InProcess
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
VARIABLES = (
    *("QUANTMILL_HOME", "QUANTMILL_DB", "QUANTMILL_DB_FILE", "QUANTMILL_DB_PASSWORD_FILE", "QUANTMILL_STORE"),
    *("QUANTMILL_LOG_FORMAT", "RAY_ADDRESS"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


Cli = Callable[..., Answer]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that does not exist yet, the environment's variables out of the way."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session", autouse=True)
def _warm_processes(warm: Warm) -> Iterator[None]:
    """Let what the command line runs in another process start without importing torch anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.local.run_in_subprocess", warm.run)
        patch.setattr("orchestrator.actions.doctor.run_python", warm.run_python)
        yield


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs run in the test's own process, one task after another: what they give is not about Ray."""
    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())


@pytest.fixture
def cli(home: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Call the command line in this process, on the test's home."""

    def call(*arguments: str | Path) -> Answer:
        capfd.readouterr()
        code = run_cli(["--home", str(home), *map(str, arguments)])
        captured = capfd.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def digits() -> Path:
    """The folder of the small shipped model."""
    return ROOT / "examples" / "models" / "digits"


@pytest.fixture(scope="session")
def home_with_digits(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A home in which the small model is registered; to be copied, not used."""
    folder = tmp_path_factory.mktemp("with-digits") / "home"
    assert run_cli(["--home", str(folder), "models", "add", str(digits)]) == 0
    return folder


@pytest.fixture
def with_digits(home: Path, home_with_digits: Path) -> Path:
    """The test's home, with the small model registered."""
    shutil.copytree(home_with_digits, home)
    return home


def state_of(home: Path) -> dict[str, bytes]:
    """Return every file of a home's store and every row of its database, to see that nothing changed."""
    import sqlite3

    files = {str(path.relative_to(home)): b"" for path in sorted((home / "store").rglob("*")) if path.is_file()}
    database = home / "quantmill.db"
    if database.is_file():
        with sqlite3.connect(database) as connection:
            files["database"] = "\n".join(connection.iterdump()).encode()
        connection.close()
    return files


@pytest.fixture
def snapshot(home: Path) -> Callable[[], dict[str, bytes]]:
    """Return the content of the test's home when called."""
    return lambda: state_of(home)
