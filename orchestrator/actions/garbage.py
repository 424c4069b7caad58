"""Removing from the store what nothing refers to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.db.jobs import list_jobs
from orchestrator.db.registry import live_digests
from orchestrator.service import Service
from workers.errors import ManifestError
from workers.storage.manifest import read_manifest
from workers.storage.store import Store

#: Blobs younger than this are never collected: a task in flight may be about to record them.
GRACE_SECONDS = 24 * 3600.0
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


def collect_garbage(service: Service, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> Garbage:
    """Remove blobs that no model, recorded result, release or job refers to.

    Parameters
    ----------
    service
        Its whole store is listed.
    grace_seconds
        Blobs put since then stay, whoever refers to them.
    dry_run
        Only count.

    Notes
    -----
    The store is listed before the database is read, so that a blob recorded in between is seen as referred to.
    """
    limit = time.time() - grace_seconds
    listed = list(service.store.list())
    old = [(digest, size) for digest, size, modified in listed if modified < limit]
    live = _reachable(service)
    dead = [(digest, size) for digest, size in old if digest not in live]
    leftovers = 0
    if not dry_run:
        for digest, _ in dead:
            service.store.delete(digest)
        leftovers = service.store.sweep(grace_seconds)
    return Garbage(len(dead), sum(size for _, size in dead), leftovers, len(listed) - len(dead))


def _reachable(service: Service) -> set[str]:
    """Return every digest that the database refers to, and those inside the manifests among them."""
    with service.database.session(read_only=True) as session:
        live = set(live_digests(session))
        for job in list_jobs(session, limit=2**31 - 1):
            weights = (job.recipe.get("evaluation") or {}).get("extractor_weights")
            live |= {weights} if weights else set()
    for digest in list(live):
        live.update(_inside(service.store, digest))
    return live


def _inside(store: Store, digest: str) -> Iterable[str]:
    """Return the digests that a blob lists, if it is a manifest."""
    if not store.exists(digest) or store.size(digest) > _MANIFEST_BYTES:
        return ()
    if not store.get_bytes(digest).startswith(_MANIFEST_START):
        return ()
    try:
        return [entry["sha256"] for entry in read_manifest(store, digest)["files"].values()]
    except ManifestError:
        return ()
