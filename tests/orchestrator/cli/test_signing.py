"""Who made a release: signed as it is published or later, carried along, and checked in the store and in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from orchestrator.db.releases import publish
from orchestrator.db.session import open_database
from workers.storage.manifest import put_tree
from workers.storage.store import open_store

Cli = Callable[..., Any]
SMALL = {
    "sampler.num_inference_steps": "2",
    "calibration.seeds": "2",
    "evaluation.seeds": "2",
    "evaluation.sqnr_seeds": "2",
    "evaluation.grid": "2",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


def write_keys(folder: Path) -> tuple[Path, Path]:
    """Write a new pair of keys; return the files of the private and the public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public half."""
    return write_keys(tmp_path / "keys")


@pytest.fixture
def other(tmp_path: Path) -> tuple[Path, Path]:
    """Somebody else's."""
    return write_keys(tmp_path / "others")


@pytest.fixture
def release(cli: Cli, with_digits: Path, tmp_path: Path) -> str:
    """A release `thing@1` of a small folder, and its manifest's digest."""
    folder = tmp_path / "thing"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    digest = put_tree(open_store(str(with_digits / "store")), folder)
    job = cli("submit", "fast-w4a8", "--model", "digits", "--json").json["job"]
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    with database.session() as session:
        publish(session, "thing", digest, 102_400, job=job, metrics={})
    database.close()
    return digest


def assert_problem(answer: Any, *words: str) -> None:
    """Check that something was found to be wrong."""
    assert answer.code == 2, answer
    text = answer.out + answer.err
    for word in words:
        assert word in text, text


def test_a_signature_is_checked_and_travels(
    cli: Cli, release: str, keys: tuple[Path, Path], other: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    unsigned = cli("artifacts", "verify", "thing", "--key", public, "--json")
    assert_problem(unsigned, "signature: got none, wanted one by key")
    assert unsigned.json["signed_by"] is None
    assert_problem(cli("artifacts", "pull", "thing", tmp_path / "no", "--key", public), "got none")
    assert not (tmp_path / "no").exists()
    key = cli("artifacts", "sign", "thing@1", "--key", private, "--json").json["signed_by"]
    good = cli("artifacts", "verify", "thing", "--key", public, "--json")
    assert good.code == 0
    assert good.json == {"release": "thing@1", "digest": release, "ok": True, "signed_by": key, "problems": []}
    assert_problem(cli("artifacts", "verify", "thing", "--key", other[1]), f"got one by {key[:12]}")
    assert_problem(cli("artifacts", "pull", "thing", tmp_path / "no", "--key", other[1]), f"got one by {key[:12]}")
    assert not (tmp_path / "no").exists()
    # Again, and by another, it stays.
    assert cli("artifacts", "sign", "thing", "--key", private).code == 0
    assert cli("artifacts", "sign", "thing", "--key", other[0]).code == 0
    out = tmp_path / "out"
    assert cli("artifacts", "pull", "thing", out, "--key", other[1]).code == 0
    assert cli("artifacts", "verify", out, "--key", other[1]).code == 0
    assert_problem(cli("artifacts", "verify", out, "--key", public), "signature: got one by key")
    assert cli("artifacts", "pull", "thing", tmp_path / "first").code == 0
    assert cli("artifacts", "verify", tmp_path / "first", "--key", public).code == 0


def test_a_changed_byte_anywhere_is_found(
    cli: Cli, release: str, keys: tuple[Path, Path], other: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    cli("artifacts", "sign", "thing", "--key", private)
    out = tmp_path / "out"
    cli("artifacts", "pull", "thing", out)

    def damaged(name: str, change: Callable[[Path], object]) -> Any:
        copy = shutil.copytree(out, tmp_path / "copy")
        change(copy / name)
        answer = cli("artifacts", "verify", copy, "--key", public)
        shutil.rmtree(copy)
        return answer

    def flip(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])

    assert_problem(damaged("weights.safetensors", flip), "weights.safetensors: got ")
    assert_problem(damaged("manifest.json", flip))
    assert_problem(damaged("manifest.json", Path.unlink), "manifest.json")
    assert_problem(damaged("model.sig", Path.unlink), "got no model.sig")
    assert_problem(damaged("model.sig", lambda path: path.write_text("{}")), "signature: got a file that is none")
    assert_problem(damaged("new.json", lambda path: path.write_text("{}")), "new.json", "not signed")
    assert_problem(damaged("scheduler/link", lambda path: path.symlink_to("/etc/passwd")), "scheduler/link: got a link")

    def forge(path: Path) -> None:
        """Change a file, and the manifest with it: the digests are right, the signature is not."""
        from workers.storage.blobs import digest_of_file

        path.write_text('{"forged": 1}')
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": digest_of_file(path)}
        (path.parent / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))

    assert_problem(damaged("config.json", forge), "config.json: got ", "manifest.json: got ")


def test_a_signature_that_somebody_put_into_the_database(
    cli: Cli, release: str, home: Path, keys: tuple[Path, Path], other: tuple[Path, Path]
) -> None:
    """It is under the right key's name, but another made it, or of something else."""
    cli("artifacts", "sign", "thing", "--key", keys[0])
    with sqlite3.connect(home / "quantmill.db") as connection:
        (mine,) = connection.execute("SELECT bundle FROM signatures").fetchone()
    cli("artifacts", "sign", "thing", "--key", other[0])
    with sqlite3.connect(home / "quantmill.db") as connection:
        (forged,) = connection.execute("SELECT bundle FROM signatures WHERE bundle <> ?", (mine,)).fetchone()
        hint = json.loads(mine)["verificationMaterial"]["publicKey"]["hint"]
        forged = json.loads(forged)
        forged["verificationMaterial"]["publicKey"]["hint"] = hint
        connection.execute("UPDATE signatures SET bundle = ? WHERE bundle = ?", (json.dumps(forged), mine))
    connection.close()
    assert_problem(cli("artifacts", "verify", "thing", "--key", keys[1]), "does not fit its content and key")


def test_keys_that_cannot_be_used(cli: Cli, release: str, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    for words in (["serve", "--drain"], ["run", "fast-w4a8", "--model", "digits"]):
        assert_problem(cli(*words, "--sign", tmp_path / "no"), "key: got ", "No such file")
        assert_problem(cli(*words, "--sign", public), "key: got ")
    private.chmod(0o644)
    assert_problem(cli("artifacts", "sign", "thing", "--key", private), "which others may read", "chmod 600")


@pytest.mark.usefixtures("with_digits", "without_ray")
def test_what_serve_and_run_publish_is_signed(cli: Cli, keys: tuple[Path, Path], other: tuple[Path, Path]) -> None:
    job = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--name", "small", "--json").json["job"]
    assert cli("serve", "--drain", "--sign", keys[0]).code == 0
    assert cli("jobs", "show", job, "--json").json["release"] == "small@1"
    assert cli("artifacts", "verify", "small", "--key", keys[1]).code == 0
    # Every result is there: it is published at once, and signed nevertheless.
    again = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--name", "small", "--sign", other[0], "--json")
    assert (again.code, again.json["release"]) == (0, "small@1")
    assert cli("artifacts", "verify", "small", "--key", other[1]).code == 0


def test_a_release_that_cannot_be_signed_does_not_keep_others_from_it(
    cli: Cli, release: str, keys: tuple[Path, Path], with_digits: Path
) -> None:
    job = cli("jobs", "ls", "--json").json[0]["job"]
    assert cli("jobs", "cancel", job).code == 0
    database = open_database(f"sqlite:///{with_digits / 'quantmill.db'}")
    ended: list[None] = []
    before = signal.getsignal(signal.SIGTERM)  # others in this process, Ray too, may have set one

    def publish_meanwhile() -> None:
        """Publish a release whose manifest is lost, then a whole one; and end who serves."""
        while signal.getsignal(signal.SIGTERM) is before and not ended:
            time.sleep(0.05)
        for name, digest in (("lost", "0" * 64), ("whole", release)):
            with database.session() as session:
                publish(session, name, digest, 102_400, job=job, metrics={})
        if not ended:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=publish_meanwhile)
    thread.start()
    answer = cli("serve", "--sign", keys[0])
    ended.append(None)
    thread.join()
    database.close()
    assert answer.code == 0
    assert "not signed: lost@1: " in answer.err
    assert cli("artifacts", "verify", "whole@1", "--key", keys[1]).code == 0
