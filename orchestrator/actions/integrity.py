"""Reading everything that the database refers to, and mending what is missing or damaged."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.db.references import Owner, Reference, references
from orchestrator.db.remake import remake_job
from orchestrator.db.repair import settle, withdraw
from orchestrator.db.session import lock_enqueue, lock_graph
from orchestrator.service import Service
from orchestrator.store_owner import require_here
from workers.errors import BlobLostError, ManifestError, NotFoundError
from workers.storage.manifest import read_files
from workers.storage.store import Store

#: Blobs that are read at once: a store far away answers several questions in the time of one.
_READERS = 4


@dataclass(frozen=True, slots=True)
class Loss:
    """A blob that is missing or damaged, and what refers to it: itself, or through a tree that lists it."""

    digest: str
    damaged: bool
    owners: tuple[Reference, ...]

    def document(self) -> dict[str, Any]:
        """Return it as JSON."""
        state = "damaged" if self.damaged else "missing"
        return {"digest": self.digest, "state": state, "of": sorted({_named(owner) for owner in self.owners})}


@dataclass(frozen=True, slots=True)
class Survey:
    """How many blobs the database refers to, how many of them are there, every byte, and the others."""

    blobs: int
    ok: int
    losses: tuple[Loss, ...]

    @property
    def to_be_given(self) -> list[str]:
        """What nobody can compute, and what to do about it, one line each."""
        lines = []
        for owner in sorted({owner for loss in self.losses for owner in loss.owners}, key=_named):
            if owner.owner is Owner.MODEL:
                again = f"quantmill models add {owner.source} --name {owner.name}"
                lines.append(f"{_named(owner)}: wanted it added again: {again}")
            elif owner.owner is Owner.RECIPE:
                lines.append(f"{_named(owner)}: wanted the recipe submitted again where the files that it names are")
        return lines


@dataclass(frozen=True, slots=True)
class Repaired:
    """How many results were withdrawn, and the jobs that make releases again."""

    results: int
    jobs: tuple[str, ...]


def survey_store(service: Service) -> Survey:
    """Read every byte of every blob that a model, release, recorded result or job refers to.

    Notes
    -----
    Nothing is written. It takes as long as reading all of them, a few at once.
    """
    with service.database.session(read_only=True) as session:
        own = list(references(session))
    owners: dict[str, dict[Reference, None]] = {}
    for reference in own:
        owners.setdefault(reference.digest, {})[reference] = None
        if reference.tree is not False:
            for digest in _files(service.store, reference):
                owners.setdefault(digest, {})[reference] = None
    with ThreadPoolExecutor(_READERS) as pool:
        states = dict(zip(owners, pool.map(lambda digest: _state(service.store, digest), owners), strict=True))
    losses = tuple(
        Loss(digest, state == "damaged", tuple(owners[digest]))
        for digest, state in sorted(states.items())
        if state != "ok"
    )
    return Survey(len(owners), len(owners) - len(losses), losses)


def repair_store(service: Service, losses: Iterable[Loss]) -> Repaired:
    """Withdraw the results whose bytes are lost and queue the jobs whose releases are, in one transaction.

    Tasks of active jobs run again by themselves; those of ended jobs when they are next wanted.

    Raises
    ------
    StoreUnreachableError
        If the store is not the database's, whose blobs lie elsewhere.
    """
    require_here(service.database, service.store)
    withdrawn: set[str] = set()
    blocked: list[str] = []
    jobs: dict[str, None] = {}
    with service.database.session() as session:
        lock_enqueue(session)
        lock_graph(session)
        for loss in losses:
            keys = {owner.key for owner in loss.owners if owner.key is not None} - withdrawn
            blocked += withdraw(session, sorted(keys), loss.digest)
            withdrawn |= keys
            jobs |= dict.fromkeys(
                owner.source for owner in loss.owners if owner.owner is Owner.RELEASE and owner.source is not None
            )
        settle(session, blocked)
        queued = tuple(dict.fromkeys(remake_job(session, job) for job in jobs))
    return Repaired(len(withdrawn), queued)


def _files(store: Store, reference: Reference) -> list[str]:
    """Return the blobs that a tree lists; none of what is no tree, or is lost itself."""
    try:
        return [digest for digest, _ in read_files(store, reference.digest).values()]
    except (BlobLostError, ManifestError):
        return []


def _state(store: Store, digest: str) -> str:
    """Return "ok", "missing" or "damaged"."""
    try:
        store.verify(digest)
    except NotFoundError:
        return "missing"
    except BlobLostError:
        return "damaged"
    return "ok"


def _named(owner: Reference) -> str:
    return f"{owner.owner} {owner.name}"
