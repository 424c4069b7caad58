"""What can be done with one release: find it, pull it, verify it, read its JSON files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orchestrator.actions.lost_bytes import sending_to_repair
from orchestrator.db.releases import find_release
from orchestrator.db.rows import ReleaseRow
from orchestrator.db.signatures import find_signature
from orchestrator.service import Service
from quant_spec.documents import read_json
from quant_spec.errors import InvalidInputError
from quant_spec.pipeline import MODEL_INDEX, denoiser_entry
from workers.errors import ManifestError
from workers.storage.blobs import check_place
from workers.storage.manifest import (
    MANIFEST_NAME,
    check_folder,
    pull_files,
    pull_tree,
    read_files,
    read_manifest,
    verify_tree,
)
from workers.storage.signature import SIGNATURE_NAME
from workers.storage.store import Store


def get_release(service: Service, ref: str) -> ReleaseRow:
    """Return the release that a reference means: name@3, name@alias, name, or a digest's beginning."""
    with service.database.session(read_only=True) as session:
        return find_release(session, ref)


def pull_denoiser(service: Service, ref: str, folder: Path) -> ReleaseRow:
    """Write the packed denoiser of a whole pipeline's release into a new folder, with its scheduler and its records.

    The folder has a `manifest.json` of its own, which lists what is in it.

    Raises
    ------
    InvalidInputError
        If the release is a denoiser alone, or the folder is not free.
    DigestMismatchError, NotFoundError
        If the store's bytes are not those of the release.
    """
    target = check_target(folder)
    release = get_release(service, ref)
    home = release_home(service.store, release.digest)
    if not home:
        raise InvalidInputError(f"--denoiser-only: got {release.ref}, which is a denoiser alone, wanted it without")
    files = {}
    for path, entry in read_files(service.store, release.digest).items():
        if path.startswith((home, "scheduler/")) or ("/" not in path and path != MODEL_INDEX):
            files[path.removeprefix(home)] = entry
    with sending_to_repair(service, release):
        pull_files(service.store, files, target)
    return release


def pull_release(service: Service, ref: str, folder: Path, signature: str | None = None) -> tuple[ReleaseRow, bool]:
    """Write a release into a new folder, every file verified; nothing is left behind if that fails.

    Its signature, the given or the oldest one, goes with it as `model.sig`. A folder into which this release was pulled
    before is kept, if every file in it still is as its digest says.

    Returns
    -------
    tuple of ReleaseRow and bool
        The release, and whether it was there already.

    Raises
    ------
    InvalidInputError
        If the folder is not empty and holds anything else, or its parent is missing.
    DigestMismatchError, NotFoundError
        If the store's bytes are not those of the release.
    """
    # Not Path's own, which fails for a name that no file can have.
    if os.path.isfile(folder / MANIFEST_NAME) and not folder.is_symlink():
        release = get_release(service, ref)
        problems = check_folder(folder, release.digest)
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise InvalidInputError(
                f"folder: got {folder.absolute()}, which is there already and not {release.ref} ({problems[0]}{more}), "
                "wanted a new or empty folder"
            )
        return release, True
    target = check_target(folder)
    release = get_release(service, ref)
    with sending_to_repair(service, release):
        pull_tree(service.store, release.digest, target)
    if signature is None:
        with service.database.session(read_only=True) as session:
            signature = find_signature(session, release.digest)
    if signature is not None:
        (target / SIGNATURE_NAME).write_text(signature, encoding="utf-8")
    return release, False


def check_target(folder: Path) -> Path:
    """Return a folder that something is to be written into, absolute, if it is new or empty and can be made.

    Raises
    ------
    InvalidInputError
        If it is not.
    """
    folder = folder.absolute()
    check_place(folder, "folder")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InvalidInputError(f"folder: got {folder}, which is there already, wanted a new or empty folder")
    return folder


def verify_release(service: Service, ref: str) -> tuple[ReleaseRow, dict[str, str]]:
    """Read every byte of a release in the store; return it, and of each lost blob its digest and what is wrong."""
    release = get_release(service, ref)
    return release, verify_tree(service.store, release.digest)


def release_home(store: Store, digest: str) -> str:
    """Return what stands before the paths of a release's packed denoiser: nothing, or "unet/" in a whole pipeline."""
    files = read_manifest(store, digest)["files"]
    if "config.json" in files or MODEL_INDEX not in files:
        return ""
    return f"{denoiser_entry(read_release_json(store, digest, MODEL_INDEX))}/"


def read_release_json(store: Store, digest: str, path: str) -> dict[str, Any]:
    """Return one JSON file of a release; ManifestError if the release has no such file."""
    entry = read_manifest(store, digest)["files"].get(path)
    if entry is None:
        raise ManifestError(f"release {digest[:12]}: got no {path}, wanted one")
    document: dict[str, Any] = read_json(store.get_bytes(entry["sha256"]), f"release {digest[:12]}: {path}")
    return document
