"""Stores of both kinds, real ones: a folder, and S3 as rclone serves it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.store import NodeStore, Store, open_cached, open_store

KEY, SECRET = "testkey", "testsecret"


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


@pytest.fixture(params=["folder", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store of each kind."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    folder = tmp_path / "store"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def store(store_url: str) -> Store:
    """An empty store of each kind."""
    return open_store(store_url)


@pytest.fixture
def node_store(store_url: str, tmp_path: Path) -> Iterator[NodeStore]:
    """The same as a worker sees it."""
    opened = open_cached(store_url, tmp_path / "cache")
    yield opened
    opened.release()


@pytest.fixture
def folder_store(tmp_path: Path) -> NodeStore:
    """An empty store in a folder."""
    folder = tmp_path / "blobs"
    folder.mkdir()
    return open_cached(str(folder), tmp_path / "cache")


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
