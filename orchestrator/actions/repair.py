"""Making lost bytes again: of one release, of a job's target before it is believed, and of everything (`verify`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.db.jobs import find_job
from orchestrator.db.lineage import recorded_outputs, tree_outputs
from orchestrator.db.remake import active_job, remake_job, withdraw_lost
from orchestrator.db.session import lock_enqueue, lock_graph
from orchestrator.service import Service
from orchestrator.store_owner import require_here
from workers.errors import BlobLostError, ManifestError
from workers.storage.manifest import holds, read_files
from workers.storage.store import Store


def remake(service: Service, job_id: str, lost: Collection[str]) -> str | None:
    """Withdraw what a job's results name of lost blobs, and queue the job again.

    Parameters
    ----------
    service
        Where the job ran.
    job_id
        Of an ended job.
    lost
        Digests of blobs that are missing or damaged, wherever among the job's results.

    Returns
    -------
    str or None
        The id of the job that makes them again, which may be one that is queued already; None if no result of the job
        names the blobs, and nothing was changed.

    Raises
    ------
    StoreUnreachableError
        If the store is not the database's, whose blobs lie elsewhere.
    """
    with service.database.session(read_only=True) as session:
        target = find_job(session, job_id).target_task
    if target is None or not lost:
        return None
    require_here(service.database, service.store)
    blobs = _with_trees(service, target, lost)
    with service.database.session() as session:
        lock_enqueue(session)
        lock_graph(session)
        if withdraw_lost(session, target, blobs, min(lost)):
            return remake_job(session, job_id)
        # What was found to be lost before is being made again already.
        return active_job(session, target)


def withdraw_if_lost(service: Service, target: str) -> bool:
    """Withdraw the recorded result of a job's target if its bytes are not all there; return whether it was.

    A look at sizes, not at every byte: what that misses is found by who reads it.
    """
    with service.database.session(read_only=True) as session:
        outputs = recorded_outputs(session, target)
    lost = sorted(blob for digest, is_tree in outputs.items() for blob in _absent(service.store, digest, is_tree))
    if not lost:
        return False
    require_here(service.database, service.store)
    blobs = _with_trees(service, target, lost)
    with service.database.session() as session:
        lock_graph(session)
        return withdraw_lost(session, target, blobs, lost[0]) > 0


def _with_trees(service: Service, target: str, lost: Collection[str]) -> set[str]:
    """Return lost blobs, and the trees that list them among what a task depends on or gives."""
    with service.database.session(read_only=True) as session:
        trees = tree_outputs(session, [target])
    return {*lost, *(tree for tree in trees for blob in lost if tree not in lost and holds(service.store, tree, blob))}


def _absent(store: Store, digest: str, is_tree: bool) -> list[str]:
    """Return the blobs of an output that are not there, or not at their size."""
    if not is_tree:
        return [] if store.exists(digest) else [digest]
    try:
        files: Mapping[str, tuple[str, int]] = read_files(store, digest)
    except (BlobLostError, ManifestError):
        return [digest]
    return [blob for blob, size in files.values() if not store.exists(blob) or store.size(blob) != size]
