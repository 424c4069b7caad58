"""Where Quantmill keeps things: the home folder, the database, the store and the Ray cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.secret_files import database_url_of
from quant_spec.errors import InvalidInputError
from workers.storage.store import CACHE_LIMIT_BYTES


@dataclass(frozen=True, slots=True)
class Settings:
    """What every command works with.

    The database and the store lie in the home folder unless `given_database_url` or another `store_url` say otherwise;
    `ray_address` is None where a local Ray is to be started. `cache_bytes` limits each node's copies of what lies in a
    remote store.
    """

    home: Path
    given_database_url: str | None
    store_url: str
    ray_address: str | None
    embedded_store: bool
    cache_bytes: int

    @property
    def embedded_database(self) -> bool:
        """Whether the database is the home's own file."""
        return self.given_database_url is None

    @property
    def database_url(self) -> str:
        """Return the database's URL, with its password if it has one."""
        if self.given_database_url is not None:
            return self.given_database_url
        # Imported here: SQLAlchemy takes longer than the commands that need no database.
        from orchestrator.db.engine import sqlite_url

        return sqlite_url(self.database_path)

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
) -> Settings:
    """Return the settings from what was given, else from the environment, else the embedded defaults.

    Parameters
    ----------
    environ
        Read for `QUANTMILL_HOME`, `QUANTMILL_DB` (or the files of `orchestrator.secret_files`), `QUANTMILL_STORE`,
        `QUANTMILL_CACHE_GIB` and `RAY_ADDRESS`; an empty value counts as absent.
    home, database_url, store_url, ray_address
        What the command line gave; these win.

    Raises
    ------
    InvalidInputError
        If the size of the cache is no size, or a file with a secret cannot be read.
    """
    folder = Path(home or environ.get("QUANTMILL_HOME") or "~/.quantmill").expanduser().absolute()
    given_database = database_url_of(environ, database_url)
    given_store = store_url or environ.get("QUANTMILL_STORE")
    if given_store and "://" not in given_store:
        given_store = str(Path(given_store).expanduser().absolute())
    return Settings(
        home=folder,
        given_database_url=given_database,
        store_url=given_store or str(folder / "store"),
        ray_address=ray_address or environ.get("RAY_ADDRESS") or None,
        embedded_store=not given_store,
        cache_bytes=_cache_bytes(environ.get("QUANTMILL_CACHE_GIB")),
    )


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
