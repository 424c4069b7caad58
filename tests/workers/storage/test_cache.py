"""The node's cache: fetched once, cut back, safe between processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workers.errors import NotFoundError
from workers.storage.blobs import blob_key
from workers.storage.cache import CachedStore
from workers.storage.store import NodeStore


class CountingStore:
    """A folder store that counts its reads, and may take its time."""

    def __init__(self, store: NodeStore, seconds: float = 0.0) -> None:
        self._store = store
        self._seconds = seconds
        self.url = store.url
        self.reads = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get_file(self, digest: str, path: Path) -> None:
        """Read a blob, slowly."""
        self.reads += 1
        time.sleep(self._seconds)
        self._store.get_file(digest, path)


def blob(number: int, size: int = 1000) -> bytes:
    """Return bytes of their own."""
    return number.to_bytes(4, "big") * (size // 4)


def cached_names(folder: Path) -> set[str]:
    """Return the digests of what a cache holds."""
    return {path.name for path in folder.glob("sha256/??/*")}


@pytest.fixture
def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "node-cache"


def test_cache_reads_each_blob_once(folder_store: NodeStore, cache_folder: Path, tmp_path: Path) -> None:
    digest = folder_store.put_bytes(blob(1))
    source = CountingStore(folder_store)
    for _ in range(2):
        cache = CachedStore(source, cache_folder, 1 << 20)
        assert cache.get_bytes(digest) == blob(1)
        cache.get_file(digest, tmp_path / "copy")
        assert cache.local_path(digest).read_bytes() == blob(1)
        cache.release()
    assert source.reads == 1


def test_cache_keeps_what_it_stored(folder_store: NodeStore, cache_folder: Path, tmp_path: Path) -> None:
    source = CountingStore(folder_store)
    cache = CachedStore(source, cache_folder, 1 << 20)
    (tmp_path / "file").write_bytes(blob(2))
    digests = [cache.put_bytes(blob(1)), cache.put_file(tmp_path / "file")]
    assert [cache.get_bytes(digest) for digest in digests] == [blob(1), blob(2)]
    assert [folder_store.get_bytes(digest) for digest in digests] == [blob(1), blob(2)]
    assert source.reads == 0
    cache.release()


def test_cache_is_cut_back_least_recently_used_first(folder_store: NodeStore, cache_folder: Path) -> None:
    digests = [folder_store.put_bytes(blob(number)) for number in range(4)]
    cache = CachedStore(folder_store, cache_folder, 3000)
    for digest in digests[:3]:
        cache.get_bytes(digest)
    cache.release()
    cache.get_bytes(digests[0])
    cache.release()
    cache.get_bytes(digests[3])
    cache.release()
    assert cached_names(cache_folder) == {digests[0], digests[2], digests[3]}


def test_cache_spares_files_in_use_even_over_its_limit(folder_store: NodeStore, cache_folder: Path) -> None:
    digests = [folder_store.put_bytes(blob(number)) for number in range(4)]
    user, other = (CachedStore(folder_store, cache_folder, 2000) for _ in range(2))
    held = user.local_path(digests[0])
    for digest in digests[1:]:
        other.get_bytes(digest)
        other.release()
    assert held.read_bytes() == blob(0)
    user.release()
    other.put_bytes(blob(9))
    assert not held.exists()


def test_cache_spares_files_of_other_processes_until_they_die(folder_store: NodeStore, cache_folder: Path) -> None:
    digests = [folder_store.put_bytes(blob(number)) for number in range(3)]
    code = (
        "import sys, time; from pathlib import Path; from workers.storage.cache import CachedStore\n"
        "from workers.storage.store import open_store\n"
        "cache = CachedStore(open_store(sys.argv[1]), Path(sys.argv[2]), 1000)\n"
        "print(cache.local_path(sys.argv[3]), flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, folder_store.url, str(cache_folder), digests[0]]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        cache = CachedStore(folder_store, cache_folder, 1000)
        cache.get_bytes(digests[1])
        cache.release()
        assert held.exists()
        process.kill()
        process.wait()
    cache.get_bytes(digests[2])
    cache.release()
    assert not held.exists()


@pytest.mark.parametrize("damaged", [b"X" * 1000, b"short", b""])
def test_damaged_cached_file_is_fetched_again(folder_store: NodeStore, cache_folder: Path, damaged: bytes) -> None:
    digest = folder_store.put_bytes(blob(1))
    cache = CachedStore(folder_store, cache_folder, 1 << 20)
    cache.get_bytes(digest)
    cache.release()
    path = cache_folder / blob_key(digest)
    path.chmod(0o644)
    path.write_bytes(damaged)
    assert cache.get_bytes(digest) == blob(1)
    cache.release()


def test_absent_blob_leaves_nothing_in_the_cache(folder_store: NodeStore, cache_folder: Path) -> None:
    cache = CachedStore(folder_store, cache_folder, 1 << 20)
    with pytest.raises(NotFoundError):
        cache.get_bytes("0" * 64)
    assert cached_names(cache_folder) == set()


def test_threads_that_want_the_same_blob_fetch_it_once(folder_store: NodeStore, cache_folder: Path) -> None:
    digest = folder_store.put_bytes(blob(1))
    source = CountingStore(folder_store, seconds=0.3)
    caches = [CachedStore(source, cache_folder, 1 << 20) for _ in range(4)]
    got: list[bytes] = []
    threads = [threading.Thread(target=lambda cache=cache: got.append(cache.get_bytes(digest))) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in caches:
        cache.release()
    assert got == [blob(1)] * 4
    assert source.reads == 1


def test_processes_that_share_a_small_cache_always_read_right(folder_store: NodeStore, cache_folder: Path) -> None:
    digests = [folder_store.put_bytes(blob(number)) for number in range(8)]
    code = (
        "import random, sys; from pathlib import Path; from workers.storage.cache import CachedStore\n"
        "from workers.storage.blobs import digest_of; from workers.storage.store import open_store\n"
        "cache = CachedStore(open_store(sys.argv[1]), Path(sys.argv[2]), 3000); chance = random.Random(sys.argv[3])\n"
        "for _ in range(100):\n"
        "    name = chance.choice(sys.argv[4:]); data = cache.local_path(name).read_bytes(); cache.release()\n"
        "    assert digest_of(data) == name"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, folder_store.url, str(cache_folder), str(seed), *digests])
        for seed in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sum(path.stat().st_size for path in cache_folder.glob("sha256/??/*")) <= 3000


def test_sweep_removes_old_partial_files(folder_store: NodeStore, cache_folder: Path) -> None:
    cache = CachedStore(folder_store, cache_folder, 1 << 20)
    digest = cache.put_bytes(blob(1))
    partial = (cache_folder / blob_key(digest)).with_name(".partial-old")
    partial.write_bytes(b"half")
    os.utime(partial, (1e9, 1e9))
    assert cache.sweep(3600.0) == 1
    assert cached_names(cache_folder) == {digest}
