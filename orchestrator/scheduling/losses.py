"""What to make of a task that says that a blob is lost: look oneself, as a node may have lost its way to the store."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.db.lineage import tree_outputs
from orchestrator.db.session import Database
from orchestrator.store_owner import require_here
from workers.errors import BlobLostError, Dependency, Fault, StoreError
from workers.execution.executor import Finished
from workers.storage.manifest import holds
from workers.storage.store import open_store


def examine_loss(database: Database, store_url: str, task: str, finished: Finished) -> Finished:
    """Return the end of a task that met a lost blob, as it is to be recorded.

    Parameters
    ----------
    database, store_url
        Where the task is queued, and the store that it read from.
    task
        Its id.
    finished
        Its end, with the fault LOST and the digest of the blob.

    Returns
    -------
    Finished
        The same with the trees that list the blob behind its digest: whatever gave one of them has to run again. Or a
        fault of the infrastructure, if the blob is there, every byte as it must be; or an outage, if the store does not
        answer, or is not the database's.

    Raises
    ------
    DatabaseError
        If the database does not answer.

    Notes
    -----
    Reads the blob once. Without this look one node with a damaged disk would take back the results of all. The
    scheduler waits for it, so a store that does not answer soon is out.
    """
    blob = finished.lost[0]
    try:
        store = open_store(store_url, quick=True)
        try:
            store.verify(blob)
        except BlobLostError:
            require_here(database, store)
            with database.session(read_only=True) as session:
                trees = tree_outputs(session, [task]) - {blob}
            return replace(finished, lost=(blob, *sorted(tree for tree in trees if holds(store, tree, blob))))
    except StoreError as error:
        said = f"{finished.error}; {error}"
        return replace(finished, fault=Fault.OUTAGE, dependency=Dependency.STORE, error=said)
    found = f"{finished.error}; but it is there, every byte: that node reads another store, or its disk is damaged"
    return replace(finished, fault=Fault.INFRASTRUCTURE, error=found)
