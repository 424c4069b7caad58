"""Signing releases: as they are published, or later; and checking who signed what."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.actions.releases import get_release, pull_release
from orchestrator.db.clock import database_time
from orchestrator.db.rows import ReleaseRow
from orchestrator.db.signatures import add_signature, find_signature, signing_keys, unsigned_releases
from orchestrator.errors import DatabaseError
from orchestrator.service import Service
from quant_spec.documents import read_plain_file
from quant_spec.errors import QuantServiceError
from workers.errors import ManifestError, StoreUnavailableError, StoreUnreachableError
from workers.storage.blobs import digest_of_file
from workers.storage.manifest import MANIFEST_NAME, check_manifest, read_manifest
from workers.storage.signature import (
    SIGNATURE_NAME,
    SignatureError,
    SigningKey,
    VerifyingKey,
    compare_files,
    load_signing_key,
    signed_files_of,
)

log = logging.getLogger(__name__)

#: Seconds between two looks for releases to sign.
_LOOK_SECONDS = 2.0
_LONGEST_SIGNATURE = 32 << 20


def read_signing_key(path: Path) -> SigningKey:
    """Read a private key; its password, if it has one, is in QUANTMILL_SIGN_PASSWORD."""
    return load_signing_key(path, os.environ.get("QUANTMILL_SIGN_PASSWORD"))


def sign_release(service: Service, ref: str, key: SigningKey) -> ReleaseRow:
    """Sign a release; its files' digests are those of its manifest, which nobody has to read the files for.

    Raises
    ------
    NotFoundError, DigestMismatchError
        If there is no such release, or its manifest is not in the store as its digest says.
    """
    release = get_release(service, ref)
    _sign(service, release.ref, release.digest, key)
    return release


@contextmanager
def signing(service: Service, key: SigningKey | None) -> Iterator[None]:
    """Sign releases as they are published while the block runs, by this orchestrator or another, and at its end.

    What a crash leaves unsigned, `sign_release` signs later.
    """
    if key is None:
        yield
        return
    with service.database.session(read_only=True) as session:
        since = database_time(session)
    ended = threading.Event()
    thread = threading.Thread(target=_sign_until, args=(service, key, since, ended), name="signing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _sign_until(service: Service, key: SigningKey, since: float, ended: threading.Event) -> None:
    """Sign what is published until told to end, and once more then; what cannot be signed now keeps nothing else."""
    service, last = service.impatient(), False
    told: set[str] = set()
    while not last:
        last = ended.wait(_LOOK_SECONDS)
        problems = set(_sign_new(service, key, since))
        for each in sorted(problems if last else problems - told):
            log.warning("not signed%s: %s", "" if last else " yet", each)
        told = problems


def _sign_new(service: Service, key: SigningKey, since: float) -> Iterator[str]:
    """Sign what is published and not signed; yield what went wrong, one line each."""
    try:
        with service.database.session(read_only=True) as session:
            found = unsigned_releases(session, key.id, since)
    except QuantServiceError as error:
        yield f"releases: {error}"
        return
    for name, version, digest in found:
        try:
            _sign(service, f"{name}@{version}", digest, key)
        except QuantServiceError as error:
            yield f"{name}@{version}: {error}"
            if isinstance(error, StoreUnavailableError | StoreUnreachableError | DatabaseError):
                # What is out is so for the next one too.
                return


def _sign(service: Service, ref: str, digest: str, key: SigningKey) -> None:
    bundle = key.sign(ref, signed_files_of(read_manifest(service.store, digest), digest))
    with service.database.session() as session:
        add_signature(session, digest, key.id, bundle)


def pull_signed(service: Service, ref: str, folder: Path, key: VerifyingKey) -> tuple[ReleaseRow, bool]:
    """Pull a release that a key must have signed; `pull_release` otherwise.

    Raises
    ------
    SignatureError
        If it has not, or has signed something else; nothing is written.
    """
    release = get_release(service, ref)
    if problems := check_signature(service, release, key):
        raise SignatureError(problems[0])
    with service.database.session(read_only=True) as session:
        bundle = find_signature(session, release.digest, key.id)
    return pull_release(service, ref, folder, bundle)


def check_signature(service: Service, release: ReleaseRow, key: VerifyingKey) -> list[str]:
    """Return what is wrong with a key's signature of a release, one line each; none if it is of exactly its files."""
    with service.database.session(read_only=True) as session:
        bundle = find_signature(session, release.digest, key.id)
        others = signing_keys(session, release.digest)
    if bundle is None:
        got = f"one by {', '.join(each[:12] for each in others)}" if others else "none"
        return [f"signature: got {got}, wanted one by key {key.id[:12]}"]
    try:
        files = signed_files_of(read_manifest(service.store, release.digest), release.digest)
        return compare_files(key.verify(bundle), files)
    except QuantServiceError as error:
        return [str(error)]


def verify_folder(folder: Path, key: VerifyingKey | None) -> tuple[str, list[str]]:
    """Read every byte of a pulled folder.

    Parameters
    ----------
    folder
        As `artifacts pull` wrote it.
    key
        Whose signature in `model.sig` is checked too.

    Returns
    -------
    tuple of str and list of str
        The digest of its manifest, and what is wrong, one line each.

    Raises
    ------
    ManifestError
        If it has no manifest, or one that is not acceptable.
    """
    try:
        data = read_plain_file(folder / MANIFEST_NAME, _LONGEST_SIGNATURE, error=ManifestError)
    except FileNotFoundError:
        raise ManifestError(f"{folder}: got no {MANIFEST_NAME}, wanted a folder that artifacts pull wrote") from None
    manifest = check_manifest(data, str(folder / MANIFEST_NAME))
    digest = digest_of_file(folder / MANIFEST_NAME)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "a link, or no plain file"
        elif path.is_file() and name != SIGNATURE_NAME:
            found[name] = digest_of_file(path)
    files = signed_files_of(manifest, digest)
    problems = compare_files(files, found)
    if key is not None:
        problems += _signature_problems(folder / SIGNATURE_NAME, files, key)
    return digest, problems


def _signature_problems(path: Path, files: dict[str, str], key: VerifyingKey) -> list[str]:
    try:
        return compare_files(key.verify(read_plain_file(path, _LONGEST_SIGNATURE, error=SignatureError)), files)
    except FileNotFoundError:
        return [f"signature: got no {SIGNATURE_NAME}, wanted one by key {key.id[:12]}"]
    except SignatureError as error:
        return [str(error)]
