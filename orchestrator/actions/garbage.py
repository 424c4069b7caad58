"""Removing from the store what nothing refers to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.db.references import Owner, Reference, references
from orchestrator.service import Service
from orchestrator.store_owner import require_own
from quant_spec.errors import InvalidInputError
from quant_spec.numbers import human_bytes
from workers.errors import BlobLostError, ManifestError
from workers.storage.manifest import read_manifest
from workers.storage.store import Store

#: Blobs younger than this are never collected: a task in flight may be about to record them.
GRACE_SECONDS = 24 * 3600.0
#: More of a store's bytes than this share go only if that was asked for: the wrong database knows none of them.
SHARE = 1 / 3
#: A blob that begins so may be a manifest (its JSON is canonical), and none is larger than the limit.
_MANIFEST_START = b'{"files":'
_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection removed, or would: blobs that nothing refers to, their bytes, and unfinished uploads."""

    blobs: int
    bytes: int
    leftovers: int
    kept: int


def collect_garbage(
    service: Service, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False, any_share: bool = False
) -> Garbage:
    """Remove blobs that no model, recorded result, release or job refers to.

    Parameters
    ----------
    service
        Its whole store is listed.
    grace_seconds
        Blobs that are younger, by the store's own clock, stay even if nothing refers to them.
    dry_run
        Only count.
    any_share
        Remove however much it is.

    Raises
    ------
    InvalidInputError
        If the store is not this database's, a model's or release's own list of files is lost, or more than a third of
        the bytes would go; nothing was removed.

    Notes
    -----
    The store is listed before the database is read, so that a blob recorded in between is seen as referred to.
    """
    require_own(service.database, service.store)
    limit = service.store.now() - grace_seconds
    listed = list(service.store.list())
    old = [(digest, size) for digest, size, modified in listed if modified < limit]
    live = _reachable(service)
    dead = [(digest, size) for digest, size in old if digest not in live]
    found, total = sum(size for _, size in dead), sum(size for _, size, _ in listed)
    leftovers = 0
    if not dry_run:
        if found > SHARE * total and not any_share:
            raise InvalidInputError(
                f"gc: got {len(dead)} of {len(listed)} blobs to remove, {human_bytes(found)} of {human_bytes(total)}, "
                "which is more than a third, wanted --yes for that (see them with --dry-run)"
            )
        for digest, _ in dead:
            service.store.delete(digest)
        leftovers = service.store.sweep(grace_seconds)
    return Garbage(len(dead), found, leftovers, len(listed) - len(dead))


def _reachable(service: Service) -> set[str]:
    """Return every digest that the database refers to, and those inside the trees among them."""
    with service.database.session(read_only=True) as session:
        known: dict[str, Reference] = {}
        for reference in references(session):
            before = known.get(reference.digest)
            # Of several that refer to one blob, the one that most depends on its list of files.
            if before is None or (before.owner is Owner.RESULT and reference.owner is not Owner.RESULT):
                known[reference.digest] = reference
    live = set(known)
    for reference in known.values():
        if reference.tree is not False:
            live.update(_inside(service.store, reference))
    return live


def _inside(store: Store, reference: Reference) -> Iterable[str]:
    """Return the digests that a tree lists."""
    digest = reference.digest
    try:
        if reference.tree is None and not _may_be_tree(store, digest):
            return ()
        return [entry["sha256"] for entry in read_manifest(store, digest)["files"].values()]
    except BlobLostError as error:
        if reference.owner is Owner.RESULT:
            # It is made again with its files when it is next wanted.
            return ()
        raise InvalidInputError(
            f"gc: got no list of the files of {reference.owner} {reference.name} ({error}), wanted it before anything "
            "goes: quantmill artifacts verify --all --repair"
        ) from error
    except ManifestError:
        return ()


def _may_be_tree(store: Store, digest: str) -> bool:
    return store.size(digest) <= _MANIFEST_BYTES and store.get_bytes(digest).startswith(_MANIFEST_START)
