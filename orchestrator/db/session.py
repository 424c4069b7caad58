"""Databases, their sessions and their schema.

A session is one transaction: it commits when its block ends, and rolls back on any error, which leaves the block as
one of ours. On SQLite it is a BEGIN IMMEDIATE, so that transactions that write run one after the other. On Postgres
they run side by side; what reads and changes a whole graph takes `lock_graph` first.

Events are kept back and written last, in order of commit. A reader that has seen event n will then never find a
smaller number later, which a plain sequence on Postgres does not give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, func, insert, inspect, select, text
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.engine import converted_errors, make_engine, parse_url, shown_location
from orchestrator.db.limits import Patience
from orchestrator.db.models import REVISIONS, Event
from orchestrator.errors import DatabaseUnreachableError, SchemaError

# Advisory locks of Postgres; any numbers that nothing else in the same database uses.
_GRAPH_LOCK, _ENQUEUE_LOCK, _EVENT_LOCK, _SCHEMA_LOCK = (0x514D0000 + number for number in range(4))

#: Called with "before" and "after" each commit; what it raises there is what a fault at that point would do.
CommitHook = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SchemaState:
    """The revision that a database is at (None: it has no schema) and the one that this code works with."""

    revision: str | None
    head: str


@dataclass(slots=True)
class Database:
    """A database that can be opened for transactions; made by `open_database`, safe to share between threads.

    `patience` is how long answers are waited for. `commit_hook` is called with "before" and "after" around each
    commit: fault injection, which only tests set.
    """

    engine: Engine
    location: URL
    commit_hook: CommitHook | None = None
    patience: Patience = field(default_factory=Patience)
    _reader: Engine = field(init=False, repr=False)

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"read_only": True}
        if self.engine.dialect.name == "postgresql":
            options["postgresql_readonly"] = True
        self._reader = self.engine.execution_options(**options)

    @property
    def url(self) -> str:
        """The URL, with its password."""
        return self.location.render_as_string(hide_password=False)

    @property
    def shown_url(self) -> str:
        """The URL for people, without its password."""
        return shown_location(self.location)

    @contextmanager
    def session(self, *, read_only: bool = False) -> Iterator[Session]:
        """Run one transaction.

        Parameters
        ----------
        read_only
            Take no lock that a writer would wait for; statements that write are refused by Postgres and must not be
            made on SQLite.

        Raises
        ------
        DatabaseError
            For whatever the driver raised; the transaction was rolled back.
        """
        with converted_errors(self.location), Session(self._reader if read_only else self.engine) as session:
            session.info["events"] = []
            yield session
            _write_events(session)
            if self.commit_hook is not None:
                self.commit_hook("before")
            session.commit()
            if self.commit_hook is not None:
                self.commit_hook("after")

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Open a database; connects only when the first session does, and creates nothing.

    Parameters
    ----------
    url
        `sqlite:////path/quantmill.db` or `postgresql://user@host/name`.

    Raises
    ------
    InvalidInputError
        If the URL is of neither form.
    """
    location, patience = parse_url(url), Patience()
    return Database(make_engine(location, patience), location, patience=patience)


def record_event(
    session: Session,
    name: str,
    *,
    job: str | None = None,
    task: str | None = None,
    attempt: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Note an event; it is written when the session commits."""
    session.info["events"].append(
        {"event": name, "job_id": job, "task_id": task, "attempt": attempt, "data": dict(data or {})}
    )


def _write_events(session: Session) -> None:
    """Write the noted events under a lock that is held to the end of the transaction, which follows at once."""
    events = session.info["events"]
    if events:
        _lock(session, _EVENT_LOCK)
        now = session.scalar(select(epoch_seconds()))
        session.execute(insert(Event), [{**each, "at": now} for each in events])


def lock_graph(session: Session) -> None:
    """Be the only transaction that promotes, ends, revives or cancels; take it before any row."""
    _lock(session, _GRAPH_LOCK)


def lock_enqueue(session: Session) -> None:
    """Be the only transaction that adds tasks; take it before `lock_graph`."""
    _lock(session, _ENQUEUE_LOCK)


def _lock(session: Session, number: int) -> None:
    # On SQLite the transaction itself is the lock.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(number)))


def current(url: str) -> SchemaState:
    """Return which revision a database is at; creates nothing.

    Raises
    ------
    DatabaseUnreachableError
        If there is no such server or database, or the file is not a database.
    """
    database = open_database(url)
    try:
        return _current(database)
    finally:
        database.close()


def require_current(database: Database) -> None:
    """Refuse a database whose schema is not this code's.

    Raises
    ------
    SchemaError
        If it has none, or one that is behind or ahead.
    """
    state = _current(database)
    if state.revision == state.head:
        return
    where = f"database {database.shown_url}"
    if state.revision is None:
        raise SchemaError(f"{where}: got no schema, wanted {state.head}; run quantmill init or quantmill db upgrade")
    if state.revision in REVISIONS:
        raise SchemaError(f"{where}: got schema {state.revision}, wanted {state.head}; run quantmill db upgrade")
    raise SchemaError(
        f"{where}: got schema {state.revision} of a newer Quantmill, wanted {state.head}; upgrade Quantmill"
    )


def _current(database: Database) -> SchemaState:
    location = database.location
    revision = None
    # Connecting to a SQLite file that is not there is an error, but here it means: nothing yet.
    if location.get_backend_name() != "sqlite" or Path(str(location.database)).exists():
        with database.session(read_only=True) as session:
            if inspect(session.connection()).has_table("alembic_version"):
                revision = session.scalar(text("SELECT version_num FROM alembic_version"))
    return SchemaState(revision, REVISIONS[-1])


def upgrade(url: str) -> SchemaState:
    """Bring a database to this code's schema, creating a SQLite file and its folder if need be.

    Any number of processes may do so at once: one works, the others wait and find it done.

    Raises
    ------
    SchemaError
        If the schema is of a newer Quantmill.
    DatabaseUnreachableError
        If it cannot be reached or the file cannot be made.
    """
    location = parse_url(url)
    sqlite = location.get_backend_name() == "sqlite"
    if sqlite:
        try:
            Path(str(location.database)).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseUnreachableError(f"database {location.database}: cannot make its folder ({error})") from error
    engine = make_engine(location, Patience(math.inf), create=True)
    try:
        with converted_errors(location), engine.begin() as connection:
            if not sqlite:
                connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            run_alembic(connection, REVISIONS[-1])
    finally:
        engine.dispose()
    return SchemaState(REVISIONS[-1], REVISIONS[-1])


def run_alembic(connection: Connection, revision: str) -> None:
    """Move the schema to a revision ("base": none) inside the connection's transaction."""
    # Imported here because it takes longer than most commands.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    version = None
    if inspect(connection).has_table("alembic_version"):
        version = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if version is not None and version not in REVISIONS:
        raise SchemaError(f"database: got schema {version} of a newer Quantmill, wanted {revision}; upgrade Quantmill")
    config = Config(attributes={"connection": connection})
    # Alembic's configuration expands %.
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    target = -1 if revision == "base" else REVISIONS.index(revision)
    try:
        if version is not None and REVISIONS.index(version) > target:
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
    except CommandError as error:
        raise SchemaError(f"database: migration to {revision} failed ({error})") from error


def migrations_folder() -> Path:
    """Return the folder of the migrations, which is installed beside this package."""
    return Path(__file__).resolve().parents[2] / "migrations"
