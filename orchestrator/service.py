"""The database and the store, opened together: what every operation behind the command line starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from orchestrator.db.session import Database, SchemaState, current, open_database, require_current, upgrade
from orchestrator.settings import Settings
from quant_spec.errors import InvalidInputError
from workers.storage.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Service:
    """An open database and a store, and the settings that they came from."""

    settings: Settings
    database: Database
    _open_store: Callable[[], Store]

    @property
    def store(self) -> Store:
        """The store; whoever can do without it, as it is out, finds out here: StoreUnreachableError."""
        return self._open_store()


@contextmanager
def open_service(settings: Settings, *, need_store: bool = True) -> Iterator[Service]:
    """Open the database and the store.

    Without `need_store` the store is opened when it is first asked for: what the database alone knows can be had while
    the store is out.

    An embedded database that has no schema yet is given one, so that a fresh home needs no `init`; any other database
    is left as it is.

    Raises
    ------
    SchemaError
        If the database's schema is behind or ahead of this code.
    DatabaseUnreachableError, StoreUnreachableError
        If one of them cannot be reached.
    """
    if settings.embedded_database and current(settings.database_url).revision is None:
        make_home(settings)
        upgrade(settings.database_url)
        need_store = True
    database = open_database(settings.database_url)
    try:
        require_current(database)
        service = Service(settings, database, cache(partial(open_store_of, settings)))
        if need_store:
            _ = service.store
        yield service
    finally:
        database.close()


def initialise(settings: Settings) -> SchemaState:
    """Create the home, the database's schema and the store; what is there already is kept.

    A schema that is behind is not touched: upgrading is a decision (`quantmill db upgrade`).
    """
    make_home(settings)
    if current(settings.database_url).revision is None:
        upgrade(settings.database_url)
    if "://" not in settings.store_url:
        _make_folder(Path(settings.store_url), "store")
    with open_service(settings):
        return current(settings.database_url)


def make_home(settings: Settings) -> None:
    """Create the home folder.

    Raises
    ------
    InvalidInputError
        If it cannot be made.
    """
    _make_folder(settings.home, "home")


def open_store_of(settings: Settings) -> Store:
    """Open the store alone; an embedded one is made if it is not there."""
    if settings.embedded_store:
        _make_folder(Path(settings.store_url), "store")
    return open_store(settings.store_url)


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{what}: got {folder}, which cannot be made ({error.strerror}), wanted a folder that can be written"
        ) from error
