"""How connections are made: SQLite as a small server would behave, Postgres with limits, errors as ours."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from orchestrator.db.limits import SERVER_LIMITS, SOCKET_LIMITS, Patience, Wait
from orchestrator.db.sql import driver_error
from orchestrator.errors import (
    ConflictError,
    DatabaseError,
    DatabaseFullError,
    DatabaseUnavailableError,
    DatabaseUnreachableError,
)
from quant_spec.errors import InvalidInputError
from workers.urls import HARMLESS_PARAMETERS, HIDDEN, SecretUrl, hide_passwords, is_plain_url, reveal, shown_url

#: How long a SQLite connection waits for another's transaction, in seconds; enqueueing a large graph takes a few.
BUSY_SECONDS = 60.0
# How long SQLite itself waits before an order to end is looked for.
_BUSY_STEP_SECONDS = 0.25

# What SQLite says; whatever Postgres' driver says while it connects means the same.
_UNREACHABLE = ("unable to open database file", "file is not a database")
_FULL = ("database or disk is full", "no space left on device")
# Postgres found that two transactions wait for each other; two claimed one key under different ids at the same moment.
_DEADLOCK, _SAME_KEY = "40P01", "uq_tasks_running_key"
# SQLite could not make its shared-memory file as large as it needs; its message is "disk I/O error".
_FULL_SQLITE = "SQLITE_IOERR_SHMSIZE"
# What passes by itself: for SQLite the names of errors, for Postgres the classes and codes of SQLSTATE.
_PASSING_SQLITE = (
    "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PROTOCOL",
)  # fmt: skip
_PASSING_POSTGRES = ("08", "40", "53", "55", "57", "58", "25006", "25P03", "25P04")

_dump = partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")
_WANTED = "wanted sqlite:////absolute/path.db or postgresql://user@host/name"
_QUOTING = (
    "wanted postgresql://user@host/name, in a password %40 for @, %3A for :, %2F for /, %3F for ?, %23 for #, "
    "%25 for %, %20 for a space"
)


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file, whatever characters its path has."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def parse_url(given: SecretUrl | str) -> URL:
    """Read a database URL; Postgres gets the psycopg driver.

    Raises
    ------
    InvalidInputError
        If it is neither a SQLite file nor a Postgres server, or a Postgres URL that can be read in several ways, as one
        with an unquoted `@` in its password: what follows it would be taken, and shown, for a host.
    """
    url = reveal(given)
    shown = HIDDEN if "@" in url and "://" not in url else shown_url(url)
    if "://" in url and not url.startswith("sqlite") and not is_plain_url(url):
        raise InvalidInputError(f"database URL: got {shown!r}, {_QUOTING}")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not `from` the error, whose text may hold parts of the URL.
        raise InvalidInputError(f"database URL: got {shown!r}, {_WANTED}") from None
    if parsed.drivername in _POSTGRES:
        return parsed.set(drivername="postgresql+psycopg")
    is_file = not (parsed.host or parsed.username or parsed.password)
    if parsed.drivername == "sqlite" and is_file and not parsed.query and parsed.database not in (None, "", ":memory:"):
        return parsed.set(database=str(Path(str(parsed.database)).expanduser().absolute()))
    raise InvalidInputError(f"database URL: got {shown!r}, {_WANTED}")


def shown_location(url: URL) -> str:
    """Return a database's URL for people: without its password."""
    return shown_url(url.render_as_string(hide_password=False))


def make_engine(url: URL, patience: Patience, *, create: bool = False) -> Engine:
    """Make an engine; nothing is connected yet.

    Parameters
    ----------
    patience
        How long its connections wait for answers.
    create
        A SQLite file may come into being, and statements may take as long as they like: for migrations.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, patience, create=create)
    # Imported here, as it takes time that who works with a file need not spend.
    from orchestrator.db.postgres import PatientConnection

    class ConnectionOfEngine(PatientConnection):
        """One whose waits this engine's patience bounds."""

    ConnectionOfEngine.patience = patience
    engine = create_engine(
        url,
        json_serializer=_dump,
        pool_size=5,
        max_overflow=20,
        connect_args={"application_name": "quantmill", **SOCKET_LIMITS},
    )

    @event.listens_for(engine, "do_connect")
    def _connect(dialect: Any, record: Any, arguments: list[Any], parameters: dict[str, Any]) -> Any:
        try:
            # What the URL says wins.
            return ConnectionOfEngine.connect(*arguments, **{"connect_timeout": patience.connect_seconds, **parameters})
        except (dialect.loaded_dbapi.Error, OSError, ValueError) as error:
            # Resolving a name raises OSError, and UnicodeError for one that cannot be a name.
            text = _without_password(" ".join(str(error).split()) or type(error).__name__, url)
            # Not `from error`, for the same reason as the text is looked through.
            raise DatabaseUnreachableError(f"database {shown_location(url)}: cannot be reached ({text})") from None

    @event.listens_for(engine, "checkout")
    def _find_gone(connection: Any, record: Any, proxy: Any) -> None:
        # Not in between the transactions of tasks, which follow each other at once.
        if connection.is_surely_there():
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            # Nor are the others, which were made before: new ones are.
            raise InvalidatePoolError from None

    @event.listens_for(engine, "connect")
    def _limit(connection: Any, record: Any) -> None:
        limits = {name: "0" for name in SERVER_LIMITS} if create else SERVER_LIMITS
        # Statements of the queue are planned once for a connection, which may be when its tables are still small.
        settings = {**limits, "enable_seqscan": "off", "jit": "off"}
        connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        connection.commit()

    return engine


def _sqlite_engine(url: URL, patience: Patience, *, create: bool) -> Engine:
    """SQLite in WAL mode, with explicit transactions: IMMEDIATE, so that a writer never has to upgrade a lock."""
    assert url.database is not None
    uri = f"{Path(url.database).as_uri()}?mode={'rwc' if create else 'rw'}"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            uri, uri=True, timeout=_BUSY_STEP_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _configure_sqlite(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine(url, creator=connect, json_serializer=_dump)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("read_only", False)
        _begin_sqlite(connection, "BEGIN" if read_only else "BEGIN IMMEDIATE", patience)

    return engine


def _begin_sqlite(connection: Connection, statement: str, patience: Patience) -> None:
    """Begin a transaction, waiting for others' to end; one whose process was stopped may last for ever."""
    wait = Wait(patience, BUSY_SECONDS)
    driver: Any = connection.connection.driver_connection
    while True:
        try:
            driver.execute(statement)
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "") != "SQLITE_BUSY" or wait.is_over():
                raise driver_error(connection, statement, error) from error
        except sqlite3.Error as error:
            raise driver_error(connection, statement, error) from error
        else:
            return


def _configure_sqlite(connection: sqlite3.Connection) -> None:
    """Set what a SQLite file does not remember, and the journal mode, which it does."""
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Two processes that turn a new file to WAL at once: SQLite fails one without waiting for the other.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def converted_errors(url: URL) -> Iterator[None]:
    """Raise the driver's errors as ours, with one line that names the database."""
    try:
        yield
    except SQLAlchemyError as error:
        raise _convert(error, url) from error
    except UnicodeEncodeError as error:
        # Half a character, as in the name of a file that is not UTF-8. No outage: it would be waited out for ever.
        raise InvalidInputError(f"text for the database: got {error.object!r}, wanted UTF-8") from error


def _convert(error: SQLAlchemyError, url: URL) -> DatabaseError:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = _without_password(" ".join(str(cause).split()) or type(cause).__name__, url)
    where = f"database {shown_location(url)}"
    low = text.lower()
    if any(sign in low for sign in _FULL) or getattr(cause, "sqlite_errorname", None) == _FULL_SQLITE:
        return DatabaseFullError(f"{where}: no room left, nothing was changed ({text})")
    if getattr(cause, "sqlstate", None) == _DEADLOCK or _SAME_KEY in low:
        return ConflictError(f"{where}: {text}")
    lost = isinstance(error, OperationalError | InterfaceError) or "file is not a database" in low
    if lost and any(sign in low for sign in _UNREACHABLE):
        return DatabaseUnreachableError(f"{where}: cannot be reached ({text})")
    if isinstance(error, PoolTimeoutError) or (isinstance(error, DBAPIError) and _passes(error)):
        return DatabaseUnavailableError(f"{where}: does not serve now ({text})")
    return DatabaseError(f"{where}: {text}")


def _passes(error: DBAPIError) -> bool:
    """Say whether what a driver raised may pass by itself."""
    name, state = getattr(error.orig, "sqlite_errorname", None), getattr(error.orig, "sqlstate", None)
    if name is not None:
        return str(name).startswith(_PASSING_SQLITE)
    if state is not None:
        return str(state).startswith(_PASSING_POSTGRES)
    # No answer, or a line that was cut.
    return error.connection_invalidated or isinstance(error, OperationalError)


def _without_password(text: str, url: URL) -> str:
    """Return a driver's text without what of its URL may be secret, which a driver may quote."""
    secrets = [str(url.password or "")]
    for name, values in url.query.items():
        if name not in HARMLESS_PARAMETERS:
            # The name too: behind an unquoted `&`, it is the rest of a password.
            secrets += [f'"{name}"', *([values] if isinstance(values, str) else values)]
    for secret in secrets:
        # One or two letters are in any text.
        text = text.replace(secret, HIDDEN) if len(secret) > 2 else text
    return hide_passwords(text)
