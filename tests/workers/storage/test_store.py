"""One contract, every store: a folder, S3, and both as a worker sees them, through the cache."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.response import StreamingBody

from workers.errors import (
    DigestMismatchError,
    DiskFullError,
    NotFoundError,
    StoreError,
    StoreUnavailableError,
    StoreUnreachableError,
)
from workers.storage.blobs import blob_key
from workers.storage.store import NodeStore, Store, open_cached, open_store
from workers.storage.store_folder import FolderStore
from workers.storage.store_s3 import PART_BYTES, S3Store

ABSENT = hashlib.sha256(b"never stored").hexdigest()
SIZES = [0, 1, 1000, (1 << 20) + 1]


def data_of(size: int) -> bytes:
    """Return bytes that are not all the same."""
    return np.random.default_rng(size).bytes(size)


@pytest.fixture(params=["plain", "cached"])
def any_store(request: pytest.FixtureRequest, store_url: str, tmp_path: Path) -> Iterator[Store]:
    """A store, plain and as a worker sees it."""
    if request.param == "plain":
        yield open_store(store_url)
        return
    cached = open_cached(store_url, tmp_path / "cache")
    yield cached
    cached.release()


class TestContract:
    """What every store does."""

    @pytest.mark.parametrize("size", SIZES)
    def test_bytes_come_back(self, any_store: Store, size: int, tmp_path: Path) -> None:
        data = data_of(size)
        digest = any_store.put_bytes(data)
        assert digest == hashlib.sha256(data).hexdigest()
        assert any_store.get_bytes(digest) == data
        any_store.get_file(digest, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        assert any_store.exists(digest)
        assert any_store.size(digest) == size

    @pytest.mark.parametrize("size", SIZES)
    def test_files_have_the_digest_of_their_bytes(self, any_store: Store, size: int, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(data_of(size))
        digest = any_store.put_file(source)
        assert digest == any_store.put_bytes(source.read_bytes())
        assert any_store.get_bytes(digest) == source.read_bytes()

    def test_absent_blobs_are_not_found(self, any_store: Store, tmp_path: Path) -> None:
        assert not any_store.exists(ABSENT)
        for call in (any_store.get_bytes, any_store.size, lambda name: any_store.get_file(name, tmp_path / "copy")):
            with pytest.raises(NotFoundError, match=ABSENT):
                call(ABSENT)
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []

    def test_verify_reads_every_byte_of_the_store_itself(self, any_store: Store, damage: Damage) -> None:
        digest = any_store.put_bytes(b"some bytes")
        assert any_store.verify(digest) == 10
        with pytest.raises(NotFoundError) as missing:
            any_store.verify(ABSENT)
        assert missing.value.digest == ABSENT
        damage(digest)
        with pytest.raises(DigestMismatchError) as damaged:
            any_store.verify(digest)
        assert damaged.value.digest == digest

    @pytest.mark.parametrize("size", [1000, PART_BYTES + 1])
    def test_a_put_replaces_what_is_damaged(self, any_store: Store, damage: Damage, size: int, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(data_of(size))
        digest = any_store.put_file(source)
        for put in (lambda: any_store.put_bytes(source.read_bytes()), lambda: any_store.put_file(source)):
            damage(digest)
            assert put() == digest
            assert any_store.verify(digest) == size

    def test_a_store_says_of_itself_what_it_was_told(self, any_store: Store) -> None:
        assert any_store.read_label() is None
        for data in (b"one", b"two"):
            any_store.write_label(data)
            assert any_store.read_label() == data
        assert list(any_store.list()) == []

    def test_the_clock_is_that_of_the_times_in_the_list(self, any_store: Store) -> None:
        before = any_store.now()
        any_store.put_bytes(b"new")
        # S3 tells whole seconds.
        assert before - 1.1 <= next(any_store.list())[2] <= any_store.now() + 1.1

    def test_delete_is_idempotent(self, any_store: Store) -> None:
        digest = any_store.put_bytes(b"to go")
        any_store.delete(digest)
        any_store.delete(digest)
        assert not any_store.exists(digest)
        with pytest.raises(NotFoundError):
            any_store.get_bytes(digest)

    def test_list_has_each_blob_once(self, any_store: Store) -> None:
        blobs = {any_store.put_bytes(data): len(data) for data in (b"a", b"bb", b"ccc", b"bb")}
        listed = list(any_store.list())
        assert {name: size for name, size, _ in listed} == blobs
        assert len(listed) == len(blobs)
        assert all(abs(time.time() - when) < 120 for _, _, when in listed)

    @pytest.mark.parametrize("name", ["", "abc", "../../etc/passwd", "A" * 64, "g" * 64, "0" * 64 + "\n"])
    def test_what_is_no_digest_is_refused(self, any_store: Store, name: str) -> None:
        with pytest.raises(StoreError, match="digest"):
            any_store.get_bytes(name)

    def test_notes_are_replaced_read_removed_and_no_blobs(self, any_store: Store) -> None:
        key, other = "a" * 64, "b" * 64
        assert any_store.get_note("checkpoint", key) is None
        for data in (b"one", b"two"):
            any_store.put_note("checkpoint", key, data)
        any_store.put_note("progress", key, b"half")
        any_store.put_note("checkpoint", other, b"other")
        assert list(any_store.list()) == []
        assert any_store.get_note("checkpoint", key) == b"two"
        for _ in range(2):
            any_store.delete_note("checkpoint", key)
        notes = [any_store.get_note(*name) for name in (("checkpoint", key), ("checkpoint", other), ("progress", key))]
        assert notes == [None, b"other", b"half"]

    @pytest.mark.parametrize(("what", "key"), [("../x", "a" * 64), ("", "a" * 64), ("progress", "../" + "a" * 64)])
    def test_names_of_notes_are_checked(self, any_store: Store, what: str, key: str) -> None:
        with pytest.raises(StoreError):
            any_store.put_note(what, key, b"")

    def test_many_threads_may_put_the_same_bytes(self, store: Store) -> None:
        data = data_of(1 << 20)
        digests: list[str] = []
        threads = [threading.Thread(target=lambda: digests.append(store.put_bytes(data))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert digests == [hashlib.sha256(data).hexdigest()] * 6
        assert store.get_bytes(digests[0]) == data

    def test_local_path_is_a_file_that_cannot_be_written(self, node_store: NodeStore) -> None:
        digest = node_store.put_bytes(b"read only")
        path = node_store.local_path(digest)
        assert path.read_bytes() == b"read only"
        assert not path.stat().st_mode & 0o222

    def test_partial_file_is_removed_when_the_blob_is_damaged(
        self, store: Store, damage: Damage, tmp_path: Path
    ) -> None:
        digest = store.put_bytes(b"some bytes")
        damage(digest)
        with pytest.raises(DigestMismatchError, match=f"wanted {digest}") as caught:
            store.get_file(digest, tmp_path / "copy")
        assert caught.value.exit_code == 2
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
        with pytest.raises(DigestMismatchError):
            store.get_bytes(digest)


class Damage:
    """Changes a stored blob behind the store's back."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, digest: str) -> None:
        path = self.root / blob_key(digest)
        size = path.stat().st_size
        path.chmod(0o644)
        path.write_bytes(b"X" * size)


@pytest.fixture
def damage(store_url: str, request: pytest.FixtureRequest) -> Damage:
    """Damage blobs of the test's store, of either kind."""
    if store_url.startswith("s3://"):
        return Damage(request.getfixturevalue("s3_server")[1] / store_url.removeprefix("s3://"))
    return Damage(Path(store_url))


def test_large_file_goes_up_and_down_s3_in_parts(s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(data_of(40 << 20))
    assert source.stat().st_size > 2 * PART_BYTES
    store = S3Store(s3_url)
    operations: list[str] = []
    store._client.meta.events.register("before-call.s3", lambda model, **_: operations.append(model.name))
    digest = store.put_file(source)
    assert operations.count("UploadPart") == 3
    assert operations.count("CompleteMultipartUpload") == 1
    store.get_file(digest, tmp_path / "copy")
    assert operations.count("GetObject") == 5
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_a_part_that_breaks_off_is_asked_for_again_and_no_more_than_five_times(s3_url: str, tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(data_of(20 << 20))
    store = S3Store(s3_url)
    digest = store.put_file(source)
    cut: list[int] = []

    def break_off(parsed: dict[str, Any], **_: Any) -> None:
        if len(cut) < limit:
            data = parsed["Body"].read()
            parsed["Body"] = StreamingBody(io.BytesIO(data[:-5]), len(data))
            cut.append(len(data))

    store._client.meta.events.register("after-call.s3.GetObject", break_off)
    limit = 2
    store.get_file(digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    before, limit = len(cut), 1000
    with pytest.raises(StoreUnavailableError):
        store.get_file(digest, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert len(cut) - before <= 3 * 5


def test_s3_requests_carry_sha256_and_no_crc_trailer(s3_url: str, tmp_path: Path) -> None:
    store = S3Store(s3_url)
    seen: list[dict[str, str]] = []
    store._client.meta.events.register(
        "before-send.s3",
        lambda request, **_: seen.append({key.lower(): str(value) for key, value in request.headers.items()}),
    )
    digest = store.put_bytes(b"signed")
    put = next(headers for headers in seen if "x-amz-checksum-sha256" in headers)
    assert digest in put["x-amz-content-sha256"]
    assert put["if-none-match"] in ("*", "b'*'")
    assert not any("crc" in key or "trailer" in key for headers in seen for key in headers)


@pytest.mark.parametrize(
    ("kept", "operations"),
    [(None, ["HeadObject", "PutObject"]), (b"once", ["HeadObject"]), (b"other", ["HeadObject", "PutObject"])],
)
def test_s3_put_of_what_is_there_sends_no_bytes_if_the_service_vouches_for_them(
    s3_url: str, kept: bytes | None, operations: list[str]
) -> None:
    store = S3Store(s3_url)
    store.put_bytes(b"once")
    events = store._client.meta.events
    asked: list[str] = []
    events.register("before-call.s3", lambda model, **_: asked.append(model.name))

    def vouch(parsed: dict[str, str], **_: object) -> None:
        # What services answer that keep no checksums, or those of other bytes.
        parsed.pop("ChecksumSHA256", None)
        if kept is not None:
            parsed["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(kept).digest()).decode()

    events.register("after-call.s3.HeadObject", vouch)
    store.put_bytes(b"once")
    assert asked == operations


def test_s3_passes_over_what_is_no_blob(s3_url: str) -> None:
    store = S3Store(s3_url)
    digest = store.put_bytes(b"blob")
    prefix = s3_url.removeprefix("s3://blobs/")
    for name in ("ab/notes.txt", f"ab/{digest}", f"{digest[:2]}/more/{digest}"):
        store._client.put_object(Bucket="blobs", Key=f"{prefix}/sha256/{name}", Body=b"mine")
    assert [name for name, _, _ in store.list()] == [digest]


def test_s3_writes_old_blobs_again(s3_url: str, s3_server: tuple[str, Path]) -> None:
    store = S3Store(s3_url)
    digest = store.put_bytes(b"old")
    path = s3_server[1] / s3_url.removeprefix("s3://") / blob_key(digest)
    os.utime(path, (1e9, 1e9))
    time.sleep(0.1)
    assert next(store.list())[2] < 2e9
    store.put_bytes(b"old")
    assert time.time() - next(store.list())[2] < 120


def test_folder_put_of_what_is_there_makes_it_young(folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(b"old")
    path = folder_store.local_path(digest)
    os.utime(path, (1e9, 1e9))
    folder_store.put_bytes(b"old")
    assert time.time() - next(folder_store.list())[2] < 120


def test_folder_replaces_a_truncated_blob(folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(b"whole")
    path = folder_store.local_path(digest)
    path.unlink()
    path.write_bytes(b"who")
    folder_store.put_bytes(b"whole")
    assert folder_store.get_bytes(digest) == b"whole"


def test_folder_local_path_refuses_a_damaged_file(folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(b"right")
    Damage(Path(folder_store.url))(digest)
    with pytest.raises(DigestMismatchError):
        folder_store.local_path(digest)


def test_folder_sweep_removes_old_partial_files_only(folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(b"kept")
    for name, age in (("old", 7200.0), ("new", 0.0)):
        partial = Path(folder_store.url, "partial", f".partial-{name}")
        partial.write_bytes(b"half")
        os.utime(partial, (time.time() - age,) * 2)
    assert folder_store.sweep(3600.0) == 1
    assert [path.name for path in Path(folder_store.url, "partial").iterdir()] == [".partial-new"]
    assert folder_store.exists(digest)


def test_s3_sweep_aborts_unfinished_uploads(s3_url: str) -> None:
    store = S3Store(s3_url)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    key = f"{prefix}/{blob_key(ABSENT)}"
    store._client.create_multipart_upload(Bucket=bucket, Key=key)
    store.put_note("progress", ABSENT, b"half")
    assert store.sweep(3600.0) == 0
    assert store.get_note("progress", ABSENT) == b"half"
    assert store.sweep(-60.0) == 2
    assert store.get_note("progress", ABSENT) is None
    assert not store._client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads")


def test_s3_sweep_passes_over_an_upload_that_ends_meanwhile(s3_url: str) -> None:
    store = S3Store(s3_url)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    upload = {"Bucket": bucket, "Key": f"{prefix}/{blob_key(ABSENT)}"}
    upload["UploadId"] = store._client.create_multipart_upload(**upload)["UploadId"]
    writer = S3Store(s3_url)

    def end(**_: object) -> None:
        writer._client.abort_multipart_upload(**upload)

    store._client.meta.events.register("after-call.s3.ListMultipartUploads", end)
    assert store.sweep(-60.0) == 0


@pytest.mark.parametrize(
    "url",
    ["", "http://host/folder", "s3://", "s3://KEY:secret@blobs/x", "s3://KEY:sec/ret@b/x", "file:///a?b", "file://x/a"],
)
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreUnreachableError, match="wanted") as caught:
        open_store(url)
    assert caught.value.exit_code == 2
    assert "sec" not in str(caught.value)


@pytest.mark.parametrize("name", ["feature%2Flogin", "a b", "what?", "#1", "ü@:&+"])
def test_odd_characters_of_a_store_are_taken_as_they_are(name: str, tmp_path: Path, s3_url: str) -> None:
    (tmp_path / name).mkdir()
    digest = open_store(str(tmp_path / name)).put_bytes(b"blob")
    assert (tmp_path / name / blob_key(digest)).read_bytes() == b"blob"
    assert open_cached(str(tmp_path / name), tmp_path / "cache").get_bytes(digest) == b"blob"
    remote = open_store(f"{s3_url}/{name}/below")
    assert isinstance(remote, S3Store)
    remote.put_bytes(b"blob")
    assert [each for each, _, _ in remote.list()] == [digest]
    assert remote.get_bytes(digest) == b"blob"
    keys = remote._client.list_objects_v2(Bucket="blobs", Prefix=s3_url.removeprefix("s3://blobs/"))["Contents"]
    assert [each["Key"] for each in keys] == [f"{s3_url.removeprefix('s3://blobs/')}/{name}/below/{blob_key(digest)}"]


def test_file_url_opens_a_folder(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    store = open_store(f"file://{tmp_path}/with%20space")
    assert isinstance(store, FolderStore)
    assert store.root == tmp_path / "with space"


def test_missing_folder_is_unreachable_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachableError, match="not a folder") as caught:
        open_store(str(tmp_path / "nowhere"))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_folder_that_goes_away_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    store = open_store(str(tmp_path / "mount"))
    (tmp_path / "mount").rmdir()
    with pytest.raises(StoreUnavailableError, match="gone") as caught:
        store.put_bytes(b"lost")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "variables", "reason"),
    [
        ("s3://nosuchbucket/x", {}, "no such bucket"),
        ("s3://blobs/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "denied"),
        ("s3://blobs/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "connect"),
        ("s3://blobs/x", {"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint"),
    ],
)
def test_s3_that_cannot_be_reached_is_named(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnreachableError, match=reason) as caught:
        open_store(url)
    assert caught.value.exit_code == 2
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_full_disk_is_named_and_leaves_no_partial_file(small_disk: Path, tmp_path: Path) -> None:
    store = open_store(str(small_disk))
    kept = store.put_bytes(b"small")
    source = tmp_path / "large"
    source.write_bytes(data_of(1 << 20))
    for put in (lambda: store.put_bytes(source.read_bytes()), lambda: store.put_file(source)):
        with pytest.raises(DiskFullError, match="disk full") as caught:
            put()
        assert caught.value.exit_code == 2
    assert [name for name, _, _ in store.list()] == [kept]
    assert list((small_disk / "partial").iterdir()) == []


def test_full_disk_on_get_leaves_no_partial_file(small_disk: Path, folder_store: NodeStore) -> None:
    digest = folder_store.put_bytes(data_of(1 << 20))
    with pytest.raises(DiskFullError):
        folder_store.get_file(digest, small_disk / "copy")
    assert list(small_disk.iterdir()) == []


def test_full_disk_under_the_cache_is_named(s3_url: str, small_disk: Path) -> None:
    digest = open_store(s3_url).put_bytes(data_of(1 << 20))
    cached = open_cached(s3_url, small_disk)
    with pytest.raises(DiskFullError):
        cached.local_path(digest)
    assert [path for path in small_disk.rglob("*partial*") if path.is_file()] == []
