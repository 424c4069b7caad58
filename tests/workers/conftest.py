"""Stores of both kinds, real ones: a folder, and S3 as rclone serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.storage.store import NodeStore, Store, open_cached, open_store


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
