"""A store knows its database: an id in both, so that nobody empties a store that is not theirs.

The store's label (`quantmill.json` at its root) holds its id and the database's; the database holds both too. A store
without a label is adopted by `init`, or when it is first used, if the database is the one that knows its blobs: it is
empty and so is the database, or more than half of some blobs that the database refers to are there. Any other store
can be used, but is not collected, until `init --adopt` says that it belongs to this database.
"""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.db.identity import Identity, read_identity, set_store, some_digests
from orchestrator.db.session import Database
from quant_spec.documents import read_json
from quant_spec.errors import InvalidInputError
from workers.errors import StoreError, StoreUnreachableError
from workers.storage.store import Store

_FORMAT = 1
_SAMPLE = 8


class StoreOwner(StrEnum):
    """Whose a store is."""

    OURS = "this database"
    NOBODY = "no database"
    OTHER = "another database"


@dataclass(frozen=True, slots=True)
class _Label:
    """What a store says of itself."""

    store: str | None
    database: str


def store_owner(database: Database, store: Store) -> StoreOwner:
    """Return whose a store is; one without a label is this database's if that knows its blobs. Changes nothing."""
    label, ours, sample = _look(database, store)
    if label is not None:
        return StoreOwner.OURS if _agree(label, ours) else StoreOwner.OTHER
    return StoreOwner.OURS if _knows(sample, store) else StoreOwner.NOBODY


def adopt_store(database: Database, store: Store, *, force: bool = False) -> StoreOwner:
    """Return whose a store is, and note that in both if it is this database's.

    Parameters
    ----------
    database, store
        The two.
    force
        Take the store, whoever has it.

    Raises
    ------
    StoreError
        If the label cannot be read or written.
    """
    owner = store_owner(database, store)
    if owner is not StoreOwner.OURS and not force:
        return owner
    label, ours, _ = _look(database, store)
    if label is not None and label == _Label(ours.store_id, ours.id):
        return StoreOwner.OURS
    if label is not None and label.store:
        wanted = label.store
    else:
        wanted = ours.store_id if ours.store_id is not None and owner is StoreOwner.OURS else uuid.uuid4().hex
    # The database first: of two processes that adopt at once, both then write what it holds.
    with database.session() as session:
        ours = set_store(session, wanted, replace=force)
    document = {"format": _FORMAT, "store": ours.store_id, "database": ours.id}
    store.write_label(json.dumps(document, indent=2).encode())
    return StoreOwner.OURS


def adopt_on_first_use(database: Database, store: Store) -> None:
    """Let a database that has no store yet adopt this one, if it is its own; costs one look at the database later."""
    with database.session(read_only=True) as session:
        if read_identity(session).store_id is not None:
            return
    # Whoever may only read the store works on.
    with suppress(StoreError):
        adopt_store(database, store)


def is_away(database: Database, store: Store) -> bool:
    """Say whether what is missing here may lie elsewhere: the database's store is another, or its label is gone.

    As of a folder whose file system is not mounted, or a store that was named by mistake: nothing in it is lost.
    """
    with database.session(read_only=True) as session:
        if read_identity(session).store_id is None:
            return False
    return store_owner(database, store) is not StoreOwner.OURS


def require_here(database: Database, store: Store) -> None:
    """Refuse to take for lost what a store lacks that is not this database's.

    Raises
    ------
    StoreUnreachableError
        If it is another store, or has lost its label.
    """
    if is_away(database, store):
        raise StoreUnreachableError(
            f"store {store.url}: got one without the label of the store of {database.shown_url}, wanted that (is it "
            "mounted?), so nothing was taken for lost; if its blobs are really gone: quantmill init --adopt"
        )


def require_own(database: Database, store: Store) -> None:
    """Refuse a store that is not this database's.

    Raises
    ------
    InvalidInputError
        If it is another's, or nobody's.
    """
    owner = adopt_store(database, store)
    if owner is not StoreOwner.OURS:
        raise InvalidInputError(
            f"store {store.url}: got the store of {owner}, wanted that of {database.shown_url}, which alone knows what "
            "may go; if the store is to be this database's from now on: quantmill init --adopt"
        )


def _look(database: Database, store: Store) -> tuple[_Label | None, Identity, list[str]]:
    """Return what the store says of itself, which database this is, and some blobs that it refers to."""
    label = _read_label(store)
    with database.session(read_only=True) as session:
        return label, read_identity(session), some_digests(session, _SAMPLE)


def _agree(label: _Label, ours: Identity) -> bool:
    return label.database == ours.id and ours.store_id in (None, label.store)


def _knows(sample: list[str], store: Store) -> bool:
    """Say whether a database that refers to these blobs, of many, is the one of this store."""
    if not sample:
        return next(iter(store.list()), None) is None
    return sum(map(store.exists, sample)) * 2 > len(sample)


def _read_label(store: Store) -> _Label | None:
    """Return what a store says of itself; a label that cannot be understood is another's."""
    data = store.read_label()
    if data is None:
        return None
    try:
        document = read_json(data, "label")
        return _Label(str(document["store"]), str(document["database"]))
    except (InvalidInputError, KeyError, TypeError):
        return _Label("", "")
