"""The proxy does what it is told to, seen through the clients that the service uses."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.faults.proxy import Mode, Proxy
from workers.errors import DigestMismatchError, StoreError, StoreFullError
from workers.storage.store import Store, open_store


@pytest.fixture
def proxy(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server; the usual variables name it."""
    parts = urlsplit(s3_environment)
    assert parts.hostname is not None
    assert parts.port is not None
    with Proxy((parts.hostname, parts.port)) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield made


@pytest.fixture
def store(proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store behind the proxy."""
    # The fixture of the URL sets the server's own address again.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    return open_store(s3_url)


def test_blobs_pass(store: Store) -> None:
    assert store.get_bytes(store.put_bytes(b"some bytes")) == b"some bytes"


def test_corrupt_bytes_are_noticed(proxy: Proxy, store: Store) -> None:
    digest = store.put_bytes(b"some bytes")
    proxy.set(Mode.CORRUPT)
    with pytest.raises(DigestMismatchError):
        store.get_bytes(digest)
    assert proxy.spoiled > 0
    proxy.set(Mode.PASS)
    assert store.get_bytes(digest) == b"some bytes"


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.UNAVAILABLE])
def test_store_that_does_not_serve_is_an_error_until_it_does(proxy: Proxy, store: Store, mode: Mode) -> None:
    digest = store.put_bytes(b"some bytes")
    proxy.set(mode)
    with pytest.raises(StoreError):
        store.get_bytes(digest)
    assert proxy.spoiled > 0
    proxy.set(Mode.PASS)
    assert store.get_bytes(digest) == b"some bytes"


def test_store_that_is_full_is_read_and_takes_nothing(proxy: Proxy, store: Store) -> None:
    digest = store.put_bytes(b"some bytes")
    proxy.set(Mode.FULL)
    assert store.get_bytes(digest) == b"some bytes"
    with pytest.raises(StoreFullError):
        store.put_bytes(b"others")
    assert proxy.spoiled > 0
    proxy.set(Mode.PASS)
    assert store.get_bytes(store.put_bytes(b"others")) == b"others"


def test_upload_that_is_cut_leaves_nothing(proxy: Proxy, store: Store) -> None:
    proxy.set(Mode.CUT, cut_after=2000)
    data = bytes(1 << 20)
    with pytest.raises(StoreError):
        store.put_bytes(data)
    assert proxy.spoiled > 0
    proxy.set(Mode.PASS)
    assert list(store.list()) == []
    assert store.get_bytes(store.put_bytes(data)) == data


def test_connections_hang_until_they_are_let_go(proxy: Proxy) -> None:
    proxy.set(Mode.HANG)
    answers: list[int] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{proxy.port}/", timeout=60)
        except urllib.error.HTTPError as error:
            answers.append(error.code)
            error.close()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert answers == []
    proxy.set(Mode.PASS)
    thread.join(60)
    assert len(answers) == 1
