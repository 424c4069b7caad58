"""A store and the database that it belongs to: nobody else removes anything from it."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.storage.store import open_store

Cli = Callable[..., Any]
GC = ("artifacts", "gc", "--grace", "0")


def blobs(home: Path) -> set[str]:
    """Return the blobs of a home's store."""
    return {digest for digest, _, _ in open_store(str(home / "store")).list()}


def label(home: Path) -> dict[str, Any]:
    """Return what a home's store says of itself."""
    found: dict[str, Any] = json.loads((home / "store" / "quantmill.json").read_text())
    return found


@pytest.fixture
def clean(cli: Cli, with_digits: Path) -> Path:
    """A home with a model whose store holds nothing else."""
    assert cli(*GC).code == 0
    return with_digits


def forget(home: Path) -> None:
    """Let a home be as an older release left it: neither side knows of the other."""
    (home / "store" / "quantmill.json").unlink()
    with sqlite3.connect(home / "quantmill.db") as connection:
        connection.execute("UPDATE service SET store_id = NULL")
    connection.close()


def test_init_writes_who_belongs_to_whom(cli: Cli, home: Path) -> None:
    assert cli("init", "--json").json["store_of"] == "this database"
    first = label(home)
    assert cli("init").code == 0
    assert label(home) == first
    with sqlite3.connect(home / "quantmill.db") as connection:
        rows = connection.execute("SELECT id, store_id FROM service").fetchall()
    connection.close()
    assert rows == [(first["database"], first["store"])]


def test_gc_refuses_the_store_of_another_database(cli: Cli, clean: Path, tmp_path: Path) -> None:
    before = blobs(clean)
    assert len(before) > 2
    store = clean / "store"
    for words in ((), ("--dry-run",), ("--yes",)):
        refused = cli("--db", f"sqlite:///{tmp_path / 'other.db'}", "--store", store, "db", "upgrade")
        assert refused.code == 0
        refused = cli("--db", f"sqlite:///{tmp_path / 'other.db'}", "--store", store, *GC, *words)
        assert (refused.code, "the store of another database" in refused.err) == (2, True), refused.err
    assert blobs(clean) == before
    assert cli(*GC).code == 0
    assert blobs(clean) == before


def test_a_label_that_cannot_be_read_is_that_of_another_database(cli: Cli, clean: Path) -> None:
    before = blobs(clean)
    for text in ("[" * 200_000 + "]" * 200_000, '{"store": NaN}', "[]", "\ud800"):
        (clean / "store" / "quantmill.json").write_text(text, errors="surrogatepass")
        answer = cli(*GC, "--yes")
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1), answer.err
    assert blobs(clean) == before


def test_gc_refuses_for_a_database_that_was_made_anew_until_it_adopts_the_store(cli: Cli, clean: Path) -> None:
    before = blobs(clean)
    for path in clean.glob("quantmill.db*"):
        path.unlink()
    assert cli("init", "--json").json["store_of"] == "another database"
    assert cli(*GC).code == 2
    assert cli("init", "--adopt", "--json").json["store_of"] == "this database"
    refused = cli(*GC)
    assert (refused.code, "more than a third" in refused.err, "--yes" in refused.err) == (2, True, True)
    assert cli(*GC, "--dry-run", "--json").json["blobs"] == len(before)
    assert blobs(clean) == before
    assert cli(*GC, "--yes", "--json").json["blobs"] == len(before)
    assert blobs(clean) == set()


def test_a_store_of_an_older_release_is_adopted_by_the_database_that_knows_it(
    cli: Cli, clean: Path, tmp_path: Path
) -> None:
    before = blobs(clean)
    forget(clean)
    other = ("--db", f"sqlite:///{tmp_path / 'other.db'}", "--store", clean / "store")
    assert cli(*other, "init", "--json").json["store_of"] == "no database"
    assert cli(*other, *GC, "--yes").code == 2
    assert not (clean / "store" / "quantmill.json").exists()
    assert cli("models", "ls").code == 0
    assert label(clean)["format"] == 1
    assert cli(*GC).code == 0
    assert blobs(clean) == before


def test_an_empty_folder_is_not_taken_for_the_store_of_a_database_that_has_data(
    cli: Cli, clean: Path, tmp_path: Path
) -> None:
    forget(clean)
    (tmp_path / "wrong").mkdir()
    assert cli("--store", tmp_path / "wrong", "models", "ls").code == 0
    assert list((tmp_path / "wrong").iterdir()) == []


def test_gc_keeps_what_is_young_by_the_stores_clock(cli: Cli, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(clean / "store"))
    young = store.put_bytes(b"young")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert cli("artifacts", "gc", "--grace", "1", "--json").json["blobs"] == 0
    monkeypatch.undo()
    os.utime(clean / "store" / "sha256" / young[:2] / young, (1e9, 1e9))
    assert cli("artifacts", "gc", "--grace", "1", "--json").json["blobs"] == 1


def test_gc_removes_nothing_while_a_models_list_of_files_is_lost(cli: Cli, clean: Path) -> None:
    model = cli("models", "show", "digits", "--json").json["digest"]
    (clean / "store" / "sha256" / model[:2] / model).unlink()
    before = blobs(clean)
    refused = cli(*GC, "--yes")
    assert (refused.code, "model digits" in refused.err) == (2, True), refused.err
    assert blobs(clean) == before


def test_foreign_files_in_the_store_are_passed_over(cli: Cli, clean: Path) -> None:
    folder = clean / "store" / "sha256" / "ab"
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    (folder / ("b" * 64)).mkdir()
    (folder / ("c" * 64)).symlink_to(folder / "notes.txt")
    (clean / "store" / "README").write_text("mine")
    assert cli(*GC, "--json").json["blobs"] == 0
    assert cli("artifacts", "verify", "--all").code == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ("c" * 64)).is_symlink()


def test_doctor_says_whose_the_store_is(cli: Cli, clean: Path, tmp_path: Path) -> None:
    checks = {check["name"]: check["detail"] for check in cli("doctor", "--json").json["checks"]}
    assert "belongs to this database" in checks["store"]


def test_garbage_is_collected_from_a_bucket_into_which_nothing_was_sent_in_parts(cli: Cli, fragile_s3: object) -> None:
    """Of such a one rclone has no list of unfinished uploads, and says that there is none of that name."""
    store = ("--store", "s3://blobs/here")
    assert cli(*store, "init").code == 0
    open_store(store[1]).put_bytes(b"garbage")
    time.sleep(1.1)  # the service's clock has whole seconds, so that a blob may be younger than nothing
    answer = cli(*store, "artifacts", "gc", "--grace", "0", "--yes", "--json")
    assert (answer.code, answer.json["blobs"], answer.json["leftovers"]) == (0, 1, 0)
