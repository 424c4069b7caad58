"""Stores that do not serve: every way in which a file system or a service says so is the store's, and nobody else's."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import S3Server, fill, set_s3_environment
from workers.errors import (
    Dependency,
    DiskFullError,
    Fault,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    dependency_of,
    fault_of,
)
from workers.execution.execute import TaskCall
from workers.execution.local import answer_call
from workers.execution.notes import TaskNotes
from workers.storage import patient
from workers.storage.patient import PatientStore
from workers.storage.store import NodeStore, open_cached, open_store
from workers.storage.store_s3 import S3Store

ABSENT = "0" * 64


class Answering(BaseHTTPRequestHandler):
    """A service that lets one in and answers everything else with one error."""

    status, code = 200, ""

    def do_HEAD(self) -> None:
        """Let in; there are no blobs."""
        self.send_response(200 if self.path.count("/") == 1 else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{type(self).code}</Code><Message>no</Message></Error>".encode()
        self.send_response(type(self).status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET = do_DELETE = _refuse

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def refusing() -> Iterator[S3Store]:
    """A store in a service that answers with errors."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        set_s3_environment(f"http://127.0.0.1:{server.server_address[1]}", patch)
        store = S3Store("s3://blobs/x", quick=True)
    yield store
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (500, "InternalError", StoreUnavailableError),
        (502, "BadGateway", StoreUnavailableError),
        (503, "SlowDown", StoreUnavailableError),
        (503, "ServiceUnavailable", StoreUnavailableError),
        (429, "TooManyRequests", StoreUnavailableError),
        (403, "AccessDenied", StoreUnavailableError),
        (400, "ExpiredToken", StoreUnavailableError),
        (404, "NoSuchBucket", StoreUnavailableError),
        (507, "InsufficientStorage", StoreFullError),
        (403, "QuotaExceeded", StoreFullError),
    ],
)
def test_answers_of_a_service_that_does_not_serve(
    refusing: S3Store, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind: type[StoreError]
) -> None:
    monkeypatch.setattr(Answering, "status", status)
    monkeypatch.setattr(Answering, "code", code)
    uses = (lambda: refusing.put_bytes(b"blob"), lambda: refusing.get_bytes(ABSENT), lambda: next(refusing.list()))
    for use in uses:
        with pytest.raises(kind) as caught:
            use()
        assert type(caught.value) is kind
        assert (fault_of(caught.value), dependency_of(caught.value)) == (Fault.OUTAGE, Dependency.STORE)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidRequest"), (501, "NotImplemented")])
def test_a_request_that_is_refused_is_no_outage(
    refusing: S3Store, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(Answering, "status", status)
    monkeypatch.setattr(Answering, "code", code)
    with pytest.raises(StoreError) as caught:
        refusing.put_note("probe", ABSENT, b"")
    assert fault_of(caught.value) is Fault.TASK


def test_a_service_that_is_gone_is_an_outage_with_exit_code_1(fragile_s3: S3Server) -> None:
    store = S3Store("s3://blobs/x", quick=True)
    digest = store.put_bytes(b"blob")
    fragile_s3.stop()
    for use in (lambda: store.put_bytes(b"other"), lambda: store.get_bytes(digest), lambda: store.exists(digest)):
        with pytest.raises(StoreUnavailableError) as caught:
            use()
        assert caught.value.exit_code == 1
    fragile_s3.start()
    assert store.get_bytes(digest) == b"blob"


def test_a_task_that_has_run_for_a_while_waits_for_its_store_as_long(
    fragile_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "PAUSE_SECONDS", 0.2)
    inner = open_cached("s3://blobs/x", tmp_path / "cache")
    fragile_s3.stop()
    young, old = PatientStore(inner), PatientStore(inner)
    old._began -= 3600.0
    with pytest.raises(StoreUnavailableError):
        young.put_bytes(b"little")
    threading.Timer(0.5, fragile_s3.start).start()
    digest = old.put_bytes(b"an hour's work")
    assert old.get_bytes(digest) == b"an hour's work"
    inner.release()


def test_notes_of_a_task_are_lost_in_an_outage_and_the_task_is_not(fragile_s3: S3Server) -> None:
    notes = TaskNotes(S3Store("s3://blobs/x", quick=True), ABSENT)
    fragile_s3.stop()
    notes.report(1, 10)
    notes._checkpoint_due = 0.0
    notes.offer_checkpoint(lambda: b"state")
    notes.clear()
    with pytest.raises(StoreUnavailableError):
        notes.load_checkpoint()


def test_a_folder_that_became_read_only(small_disk: Path, tmp_path: Path) -> None:
    store = open_cached(str(small_disk), tmp_path / "cache")
    digest = store.put_bytes(b"blob")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for use in (
        lambda: store.put_bytes(b"other"),
        lambda: store.put_note("probe", ABSENT, b""),
        lambda: store.delete(digest),
    ):
        with pytest.raises(StoreUnavailableError, match="Read-only") as caught:
            use()
        assert (fault_of(caught.value), dependency_of(caught.value)) == (Fault.OUTAGE, Dependency.STORE)
    assert store.get_bytes(digest) == b"blob"


def test_a_folder_whose_file_system_is_gone_has_lost_no_blobs(small_disk: Path, tmp_path: Path) -> None:
    store = open_cached(str(small_disk), tmp_path / "cache")
    digest = store.put_bytes(b"blob")
    with pytest.raises(NotFoundError):
        store.get_bytes(ABSENT)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small_disk)], check=True)
    try:
        for use in (store.get_bytes, store.size, store.local_path):
            with pytest.raises(StoreUnavailableError, match="mounted"):
                use(digest)
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    assert store.get_bytes(digest) == b"blob"


def test_a_full_folder_is_the_stores_and_a_full_node_the_clusters(
    small_disk: Path, folder_store: NodeStore, tmp_path: Path
) -> None:
    full = open_store(str(small_disk))
    with pytest.raises(StoreFullError, match="disk full") as caught:
        full.put_bytes(b"x" * (1 << 20))
    assert (caught.value.exit_code, dependency_of(caught.value)) == (2, Dependency.STORE)
    digest = folder_store.put_bytes(b"x" * (1 << 20))
    with pytest.raises(DiskFullError) as on_node:
        folder_store.get_file(digest, small_disk / "copy")
    assert (fault_of(on_node.value), dependency_of(on_node.value)) == (Fault.OUTAGE, Dependency.CLUSTER)


def test_a_task_on_a_node_without_room_says_that_the_cluster_is_out(small_disk: Path, s3_url: str) -> None:
    fill(small_disk)
    answer = answer_call(TaskCall("noop", {"payload": 1}, {}, s3_url, str(small_disk / "cache")))
    assert (answer["fault"], answer["dependency"]) == ("outage", "cluster")


def test_a_folder_that_goes_while_something_is_written_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, away = tmp_path / "store", tmp_path / "away"
    root.mkdir()
    store = open_store(str(root))
    kept = store.put_bytes(b"kept")
    # Whoever looks sees it, and it goes right after that.
    root.rename(away)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    with pytest.raises(StoreUnavailableError, match="No such file or directory"):
        store.put_bytes(b"another")
    monkeypatch.undo()
    assert not root.exists()
    away.rename(root)
    assert store.get_bytes(kept) == b"kept"
