"""Where Quantmill keeps things: the home folder, the database, the store and the Ray cluster."""

from __future__ import annotations

import getpass
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.secret_files import database_url_of
from quant_spec.errors import InvalidInputError
from workers.storage.store import CACHE_LIMIT_BYTES
from workers.urls import HIDDEN, SecretUrl, shown_url

_LONGEST_OWNER = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """What every command works with.

    The database and the store lie in the home folder unless `given_database` or another `store` say otherwise; both may
    hold a password, and show none. `ray_address` is None where a local Ray is to be started. `cache_bytes` limits each
    node's copies of what lies in a remote store. `allowed_paths` are folders that recipes and model folders may name
    files in, besides their own. `owner` is whose jobs are submitted.
    """

    home: Path
    given_database: SecretUrl | None
    store: SecretUrl
    ray_address: str | None
    embedded_store: bool
    cache_bytes: int
    allowed_paths: tuple[Path, ...] = ()
    owner: str = ""

    @property
    def embedded_database(self) -> bool:
        """Whether the database is the home's own file."""
        return self.given_database is None

    @property
    def database_url(self) -> SecretUrl:
        """Return the database's URL; `reveal` gives the password that it may have."""
        if self.given_database is not None:
            return self.given_database
        # Imported here: SQLAlchemy takes longer than the commands that need no database.
        from orchestrator.db.engine import sqlite_url

        return SecretUrl(sqlite_url(self.database_path))

    @property
    def store_url(self) -> str:
        """Return the store's URL as it was given, for whoever opens it; show `store`."""
        return self.store.reveal()

    @property
    def cache_dir(self) -> Path:
        """Return the folder of this machine's copies of what lies in a remote store."""
        return self.home / "cache"

    @property
    def database_path(self) -> Path:
        """Return the file of the embedded database."""
        return self.home / "quantmill.db"


def resolve_settings(
    environ: Mapping[str, str],
    *,
    home: str | None = None,
    database_url: str | None = None,
    store_url: str | None = None,
    ray_address: str | None = None,
    allowed_paths: Sequence[str] = (),
) -> Settings:
    """Return the settings from what was given, else from the environment, else the embedded defaults.

    Parameters
    ----------
    environ
        Read for `QUANTMILL_HOME`, `QUANTMILL_DB` (or the files of `orchestrator.secret_files`), `QUANTMILL_STORE`,
        `QUANTMILL_CACHE_GIB`, `QUANTMILL_ALLOWED_PATHS` (folders, joined by colons), `QUANTMILL_OWNER` (the account's
        name by default) and `RAY_ADDRESS`; an empty value counts as absent.
    home, database_url, store_url, ray_address
        What the command line gave; these win.
    allowed_paths
        What the command line gave, besides those of the environment.

    Raises
    ------
    InvalidInputError
        If the size of the cache is no size, the store a URL gone wrong, the owner no name, or a file with a secret
        cannot be read.
    """
    folder = Path(home or environ.get("QUANTMILL_HOME") or "~/.quantmill").expanduser().absolute()
    given_database = database_url_of(environ, database_url)
    given_store = store_url or environ.get("QUANTMILL_STORE")
    if given_store and "://" not in given_store:
        # Below, it becomes a path, whatever it was meant as.
        if shown_url(given_store) == HIDDEN:
            raise InvalidInputError(
                "store: got what looks like a URL with a password but is none, wanted s3://bucket/prefix or a folder, "
                "as ./NAME if that is its name"
            )
        given_store = str(Path(given_store).expanduser().absolute())
    allowed = [*allowed_paths, *environ.get("QUANTMILL_ALLOWED_PATHS", "").split(os.pathsep)]
    return Settings(
        home=folder,
        given_database=SecretUrl(given_database) if given_database else None,
        store=SecretUrl(given_store or str(folder / "store")),
        ray_address=ray_address or environ.get("RAY_ADDRESS") or None,
        embedded_store=not given_store,
        cache_bytes=_cache_bytes(environ.get("QUANTMILL_CACHE_GIB")),
        allowed_paths=tuple(Path(path).expanduser().absolute() for path in allowed if path),
        owner=_owner(environ.get("QUANTMILL_OWNER")),
    )


def _owner(name: str | None) -> str:
    """Return who submits jobs: the given name, else the account's."""
    if name:
        if len(name) > _LONGEST_OWNER or not name.isprintable():
            raise InvalidInputError(
                f"QUANTMILL_OWNER: got {name[:40]!r}, wanted a name of at most {_LONGEST_OWNER} characters"
            )
        return name
    try:
        return getpass.getuser()[:_LONGEST_OWNER]
    except (KeyError, OSError):
        # An account without a name, as in a container of an arbitrary number.
        return str(os.getuid())


def _cache_bytes(gib: str | None) -> int:
    """Read a size in GiB; the default if there is none."""
    if not gib:
        return CACHE_LIMIT_BYTES
    try:
        size = float(gib)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise InvalidInputError(f"QUANTMILL_CACHE_GIB: got {gib!r}, wanted a number above 0")
    return int(size * 2**30)
