"""The database and the store, opened together: what every operation behind the command line starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from orchestrator.db.session import Database, SchemaState, current, open_database, require_current, upgrade
from orchestrator.settings import Settings
from orchestrator.store_owner import StoreOwner, adopt_on_first_use, adopt_store
from quant_spec.errors import InvalidInputError
from workers.storage.private import is_private, make_private, tighten
from workers.storage.store import Store, open_store


@dataclass(frozen=True, slots=True)
class Service:
    """An open database and a store, and the settings that they came from."""

    settings: Settings
    database: Database
    _open_store: Callable[[], Store]

    @property
    def store(self) -> Store:
        """The store, opened when it is first used; StoreUnreachableError if it does not answer."""
        return self._open_store()

    def impatient(self) -> Service:
        """Return the same with a store that gives up soon: for what others wait for while the store hangs."""
        return replace(self, _open_store=cache(partial(open_store, self.settings.store_url, quick=True)))


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
        service = Service(settings, database, cache(partial(_open_own_store, settings, database)))
        if need_store:
            _ = service.store
        yield service
    finally:
        database.close()


def _open_own_store(settings: Settings, database: Database) -> Store:
    """Open the store; one that belongs to no database yet is this one's from now on."""
    store = open_store_of(settings)
    adopt_on_first_use(database, store)
    return store


def initialise(settings: Settings, *, adopt: bool = False) -> tuple[SchemaState, StoreOwner]:
    """Create the home, the database's schema and the store; what is there already is kept.

    A schema that is behind is not touched: upgrading is a decision (`quantmill db upgrade`). Taking a store that is not
    this database's is one too: `adopt`.
    """
    make_home(settings)
    if current(settings.database_url).revision is None:
        upgrade(settings.database_url)
    _tighten_home(settings)
    if "://" not in settings.store_url:
        _make_folder(Path(settings.store_url), "store", private=settings.embedded_store)
    with open_service(settings) as service:
        owner = adopt_store(service.database, service.store, force=adopt)
        return current(settings.database_url), owner


def make_home(settings: Settings) -> None:
    """Create the home folder.

    Raises
    ------
    InvalidInputError
        If it cannot be made.
    """
    _make_folder(settings.home, "home", private=True)


def open_store_of(settings: Settings) -> Store:
    """Open the store alone; an embedded one is made if it is not there."""
    if settings.embedded_store:
        _make_folder(Path(settings.store_url), "store", private=True)
    return open_store(settings.store_url)


def private_paths(settings: Settings) -> list[Path]:
    """Return what of a home there is and is for its owner alone: the home, its database, its store and its caches.

    Below a home that nobody else may enter nothing can be reached; a copy of it, or a home opened on purpose, is
    another matter.
    """
    database = settings.database_path
    beside = [database.with_name(f"{database.name}{end}") for end in ("-wal", "-shm")]
    folders = [settings.home / name for name in ("store", "cache", "releases")]
    return [path for path in (settings.home, database, *beside, *folders) if path.exists()]


def _tighten_home(settings: Settings) -> None:
    """Take a home that an older release made from everybody but its owner."""
    for path in private_paths(settings):
        if not is_private(path):
            with suppress(PermissionError):
                tighten(path)


def _make_folder(folder: Path, what: str, *, private: bool) -> None:
    """Make a folder that is not there: for its owner alone, or as the umask says where others may share it."""
    try:
        make_private(folder) if private else folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{what}: got {folder}, which cannot be made ({error.strerror}), wanted a folder that can be written"
        ) from error
