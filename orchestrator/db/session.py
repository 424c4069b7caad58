"""Databases, their sessions and their schema.

A session is one transaction: it commits when its block ends, and rolls back on any error, which leaves the block as
one of ours. On SQLite it is a BEGIN IMMEDIATE, so that transactions that write run one after the other. On Postgres
they run side by side, under `lock_graph` or `share_graph`:

* what ends, cancels or revives jobs or tasks, or makes tasks wanted, holds `lock_graph` and is alone;
* what only finishes tasks, and counts down and queues those that read them, shares the graph with others of its kind;
* claims hold neither.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, func, inspect, select, text
from sqlalchemy.orm import Session as Session

from orchestrator.db.engine import converted_errors, make_engine, parse_url, shown_location
from orchestrator.db.event_log import record_event as record_event
from orchestrator.db.event_log import write_events
from orchestrator.db.limits import Patience
from orchestrator.db.models import REVISIONS
from orchestrator.db.sql import Direct, direct, is_postgres, send, statement
from orchestrator.errors import ConflictError, DatabaseUnreachableError, SchemaError
from workers.storage.private import make_private, make_private_file
from workers.urls import SecretUrl

# Advisory locks of Postgres; any numbers that nothing else in the same database uses.
_GRAPH_LOCK, _ENQUEUE_LOCK, _SCHEMA_LOCK = (0x514D0000 + number for number in (0, 1, 3))

#: Postgres' channel on which orchestrators are woken.
CHANNEL = "quantmill"
_NOTIFY = statement(f"NOTIFY {CHANNEL}")
_SAVEPOINT, _SHARE = statement("SAVEPOINT shared"), statement(f"SELECT pg_advisory_xact_lock_shared({_GRAPH_LOCK})")
#: How often a transaction is tried that others get in the way of.
CONFLICTS = 10

T = TypeVar("T")

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

    # Not in its text: SQLAlchemy hides a password there, but no parameter that is one.
    engine: Engine = field(repr=False)
    location: URL = field(repr=False)
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
    def session(self, *, read_only: bool = False, ahead: bool = False) -> Iterator[Session]:
        """Run one transaction.

        Parameters
        ----------
        read_only
            Take no lock that a writer would wait for; statements that write are refused by Postgres and must not be
            made on SQLite.
        ahead
            Send statements without waiting for answers that nobody has asked for, where the database can.

        Raises
        ------
        DatabaseError
            For whatever the driver raised; the transaction was rolled back.
        """
        engine = self._reader if read_only else self.engine
        # The transaction is the connection's, which the session joins where a statement of SQLAlchemy's needs it: most
        # that are made for every task do not.
        with converted_errors(self.location), engine.connect() as connection, connection.begin() as transaction:
            with Session(connection) as session:
                way = Direct(connection)
                session.info |= {"events": [], "direct": way}
                if ahead and way.is_postgres:
                    way.driver.send_ahead()
                yield session
                write_events(session)
                if "news" in session.info:
                    send(session, _NOTIFY)
            if self.commit_hook is not None:
                self.commit_hook("before")
            if transaction.is_active:
                transaction.commit()
            if self.commit_hook is not None:
                self.commit_hook("after")

    def transact(self, work: Callable[[Session], T]) -> T:
        """Run `work` as one transaction; again, at once, if it ran into another: one of the two must give way.

        Raises
        ------
        ConflictError
            If that happened `CONFLICTS` times.
        """
        for _ in range(CONFLICTS - 1):
            try:
                with self.session(ahead=True) as session:
                    return work(session)
            except ConflictError:
                # Not all at the same moment again.
                time.sleep(random.uniform(0.0, 0.01))
        with self.session(ahead=True) as session:
            return work(session)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_database(url: SecretUrl | str) -> Database:
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


class GraphNeededError(Exception):
    """What was begun under `share_graph` turns out to need `lock_graph`; never leaves this package."""


def lock_graph(session: Session) -> None:
    """Be the only transaction that changes the graph; take it before any row, and not while the graph is shared."""
    if not is_alone(session):
        _lock(session, "pg_advisory_xact_lock", _GRAPH_LOCK)
        session.info["alone"] = True


def is_alone(session: Session) -> bool:
    """Say whether the session holds `lock_graph`; on SQLite the transaction itself is that lock."""
    return not is_postgres(session) or "alone" in session.info


def share_graph(session: Session) -> None:
    """Keep those out who need the graph for themselves, until the transaction ends."""
    if not is_alone(session):
        _lock(session, "pg_advisory_xact_lock_shared", _GRAPH_LOCK)


@contextmanager
def trying_shared(session: Session) -> Iterator[None]:
    """Share the graph in a block that may find that this does not do.

    Raises
    ------
    GraphNeededError
        If the block did. All that it changed and locked, also the graph, and all events that it noted are then undone.
    """
    if is_alone(session):
        yield
        return
    noted = len(session.info["events"])
    if direct(session).is_ahead:
        send(session, _SAVEPOINT)
        send(session, _SHARE)
    else:
        session.connection().exec_driver_sql(f"SAVEPOINT shared; SELECT pg_advisory_xact_lock_shared({_GRAPH_LOCK})")
    try:
        yield
    except GraphNeededError:
        session.connection().exec_driver_sql("ROLLBACK TO SAVEPOINT shared; RELEASE SAVEPOINT shared")
        del session.info["events"][noted:]
        raise
    # The savepoint stays: the commit does away with it, and each statement costs.


def need_graph(session: Session) -> None:
    """Raise GraphNeededError if the graph is only shared; for blocks of `trying_shared`."""
    if not is_alone(session):
        raise GraphNeededError


def note_ready(session: Session, tasks: int) -> None:
    """Count tasks that this transaction made ready."""
    session.info["ready"] = ready_count(session) + tasks


def ready_count(session: Session) -> int:
    """Return how many tasks this transaction has made ready."""
    count: int = session.info.get("ready", 0)
    return count


def notify_others(session: Session) -> None:
    """Wake orchestrators that wait for something to claim, when the session commits."""
    if is_postgres(session):
        session.info["news"] = True


def lock_enqueue(session: Session) -> None:
    """Be the only transaction that adds tasks; take it before `lock_graph`."""
    _lock(session, "pg_advisory_xact_lock", _ENQUEUE_LOCK)


def _lock(session: Session, function: str, number: int) -> None:
    # On SQLite the transaction itself is the lock.
    if is_postgres(session):
        session.connection().exec_driver_sql(f"SELECT {function}({number})")


def current(url: SecretUrl | str) -> SchemaState:
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


def upgrade(url: SecretUrl | str) -> SchemaState:
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
            # SQLite gives the files beside it, with what is not in it yet, the same mode.
            make_private(Path(str(location.database)).parent)
            make_private_file(Path(str(location.database)))
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
