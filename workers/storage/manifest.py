"""Trees: a folder as an artifact. Its manifest lists every file's digest and size; the manifest's digest names it.

The manifest is canonical JSON (sorted keys, no spaces, UTF-8):
`{"files":{"unet/config.json":{"bytes":123,"sha256":"…"}},"format":1}`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant_spec.documents import read_json
from quant_spec.model_files import MANIFEST_FILE
from workers.errors import BlobLostError, DigestMismatchError, ManifestError, NotFoundError, StoreError
from workers.storage.blobs import check_digest, digest_of, digest_of_file, disk_error
from workers.storage.names import check_path, check_paths
from workers.storage.store import NodeStore, Store

FORMAT = 1
#: The file that a pulled folder has besides those that the manifest lists.
MANIFEST_NAME = MANIFEST_FILE
#: Beside it, once somebody has signed it.
SIGNATURE_NAME = "model.sig"


def put_manifest(store: Store, files: Mapping[str, tuple[str, int]]) -> str:
    """Store the manifest of blobs that are in the store already.

    Parameters
    ----------
    store
        Holds the blobs.
    files
        Path in the tree to (digest, bytes).

    Returns
    -------
    str
        The manifest's digest, which names the tree.

    Raises
    ------
    ManifestError
        If a path is not acceptable.
    """
    return store.put_bytes(manifest_bytes(_manifest(files)))


def manifest_digest(files: Mapping[str, tuple[str, int]]) -> str:
    """Return the digest of the tree that `put_manifest` would make of these files, storing nothing."""
    return digest_of(manifest_bytes(_manifest(files)))


def _manifest(files: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """Return the manifest of files, checked."""
    entries = {path: {"sha256": digest, "bytes": size} for path, (digest, size) in files.items()}
    return _check({"format": FORMAT, "files": entries}, "manifest")


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Return the one serialised form of a manifest."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def put_tree(store: Store, folder: Path) -> str:
    """Store every file of a folder, and its manifest.

    Parameters
    ----------
    store
        Where to.
    folder
        Its `manifest.json`, if any, is left out: it is made anew when the tree is pulled.

    Returns
    -------
    str
        The manifest's digest, which names the tree.

    Raises
    ------
    ManifestError
        If the folder has a link, anything that is neither file nor folder, or a path that is not acceptable.
    """
    paths = []
    for root, names, leaves in os.walk(folder):
        for name in sorted(names + leaves):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ManifestError(f"{folder}: got {relative!r} that is a link or special, wanted files and folders")
            if path.is_file() and relative != MANIFEST_NAME:
                check_path(relative)
                paths.append(relative)
    check_paths(paths)
    return put_manifest(
        store, {path: (store.put_file(folder / path), (folder / path).stat().st_size) for path in paths}
    )


def read_manifest(store: Store, digest: str) -> dict[str, Any]:
    """Return a tree's manifest, checked.

    Raises
    ------
    NotFoundError, DigestMismatchError
        If the store has no such blob, or other bytes under its name.
    ManifestError
        If the blob is no manifest, or has a path that is not acceptable.
    """
    data = store.get_bytes(digest)
    where = f"manifest {digest[:12]}"
    return check_manifest(data, where)


def check_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Return a manifest from its bytes, checked; raises as `read_manifest`."""
    return _check(read_json(data, where, error=ManifestError), where)


def read_files(store: Store, digest: str) -> dict[str, tuple[str, int]]:
    """Return the files of a tree as `put_manifest` takes them: path to (digest, bytes); raises as `read_manifest`."""
    return {path: (entry["sha256"], entry["bytes"]) for path, entry in read_manifest(store, digest)["files"].items()}


def _check(manifest: Any, where: str) -> dict[str, Any]:
    """Return the manifest if it has the right form; else ManifestError."""
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise ManifestError(f"{where}: got no manifest of format {FORMAT}, wanted one")
    for path, entry in manifest["files"].items():
        if not _is_entry(entry):
            raise ManifestError(f"{where}: got a bad entry for {path[:200]!r}, wanted its sha256 and bytes")
    if MANIFEST_NAME in {path.casefold() for path in manifest["files"]}:
        raise ManifestError(f"{where}: got a file named {MANIFEST_NAME}, wanted that name free for the manifest itself")
    check_paths(manifest["files"])
    return manifest


def _is_entry(entry: Any) -> bool:
    """Say whether a manifest's entry has a digest and a size."""
    if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
        return False
    size, digest = entry["bytes"], entry["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(digest, str):
        return False
    try:
        check_digest(digest)
    except StoreError:
        return False
    return True


def pull_tree(store: Store, digest: str, target: Path) -> dict[str, Any]:
    """Write a tree into a new folder, verified, with its `manifest.json`; on any failure nothing is left behind.

    Parameters
    ----------
    store
        Where from.
    digest
        Of the tree's manifest.
    target
        Must not exist, or be an empty folder; its parent must exist.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    NotFoundError, DigestMismatchError
        If a blob is missing or is not what its digest says.
    ManifestError
        If the manifest is not acceptable, or the target is not free.
    DiskFullError
        If there is no room.
    """
    manifest = read_manifest(store, digest)
    _write_tree(store, manifest, target)
    return manifest


def pull_files(store: Store, files: Mapping[str, tuple[str, int]], target: Path) -> None:
    """Write some blobs into a new folder, as `pull_tree` writes a tree that lists them: path to (digest, bytes)."""
    _write_tree(store, _manifest(files), target)


def _write_tree(store: Store, manifest: Mapping[str, Any], target: Path) -> None:
    """Write a tree into a new folder."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise ManifestError(f"{target}: got something there already, wanted a new or empty folder")
    if not target.parent.is_dir():
        raise ManifestError(f"{target}: got no folder {target.parent}, wanted one to write into")
    try:
        _pull(store, manifest, target)
    except OSError as error:
        raise disk_error(error, target) from error


def _pull(store: Store, manifest: Mapping[str, Any], target: Path) -> None:
    """Write a tree beside its target, then rename it."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-partial-", dir=target.parent))
    try:
        for path, entry in manifest["files"].items():
            place = partial / check_path(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(entry["sha256"], place)
            place.chmod(0o644)
        (partial / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
        partial.chmod(0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link_tree(store: NodeStore, digest: str, target: Path) -> dict[str, Any]:
    """Make a folder of symbolic links to a tree's local files: what a task reads, without copying.

    As `pull_tree`, but the files may only be read and are there until the store's `release`.
    """
    manifest = read_manifest(store, digest)
    target.mkdir(parents=True, exist_ok=True)
    for path, entry in manifest["files"].items():
        place = target / check_path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(store.local_path(entry["sha256"]))
    (target / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    return manifest


def check_folder(folder: Path, digest: str, *, alone: bool = True) -> list[str]:
    """Return what is wrong with a tree that was pulled into a folder, one line each; none if every byte is right.

    Unless it need not be `alone`, files that the manifest does not list are wrong too.
    """
    try:
        manifest = (folder / MANIFEST_NAME).read_bytes()
        if digest_of(manifest) != digest:
            return [f"{MANIFEST_NAME}: got that of {digest_of(manifest)[:12]}, wanted that of {digest[:12]}"]
        files = check_manifest(manifest, f"manifest {digest[:12]}")["files"]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path)}
    except (OSError, ManifestError) as error:
        return [f"{MANIFEST_NAME}: got {error}, wanted that of {digest[:12]}"]
    more = sorted(there - {*files, MANIFEST_NAME, SIGNATURE_NAME}) if alone else ()
    problems = [f"{path}: got a file that the release does not have, wanted none" for path in more]
    for path, entry in sorted(files.items()):
        place = folder / path
        if not place.is_file() or place.is_symlink():
            problems.append(f"{path}: got no such file, wanted it")
        elif (got := digest_of_file(place)) != entry["sha256"]:
            problems.append(f"{path}: got bytes with sha256 {got}, wanted {entry['sha256']}")
    return problems


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def verify_tree(store: Store, digest: str) -> dict[str, str]:
    """Read every byte of a tree in the store.

    Returns
    -------
    dict of str to str
        For each blob that is missing or damaged its digest, and a line that says what is wrong; none if all is right.
    """
    try:
        manifest = read_manifest(store, digest)
    except (BlobLostError, ManifestError) as error:
        return {digest: str(error)}
    problems = {}
    for path, entry in sorted(manifest["files"].items()):
        try:
            size = store.verify(entry["sha256"])
        except NotFoundError:
            problems[entry["sha256"]] = f"{path}: got no blob {entry['sha256']}, wanted it in the store"
            continue
        except DigestMismatchError as error:
            problems[entry["sha256"]] = f"{path}: {error}"
            continue
        if size != entry["bytes"]:
            problems[digest] = f"{path}: got {size} bytes, wanted {entry['bytes']}"
    return problems


def holds(store: Store, digest: str, blob: str) -> bool:
    """Say whether a blob is a tree that lists another; False for one that is lost itself."""
    try:
        return any(entry["sha256"] == blob for entry in read_manifest(store, digest)["files"].values())
    except (BlobLostError, ManifestError):
        return False
