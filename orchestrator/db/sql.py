"""Statements as text that both databases read, for what is made for every task.

SQLAlchemy's expressions are built and hashed anew for each call, which for a task of a few milliseconds was most of
what the queue cost. A text is compiled once, and the driver takes it as it is. Its parameters are few, however many
rows it is about: rows come as one JSON text (`rows_json`), which the database takes apart.
"""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

POSTGRES = "postgresql"
_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    # Not now(): that is the start of the transaction, which may have waited for a lock since.
    POSTGRES: "CAST(extract(epoch FROM statement_timestamp()) AS double precision)",
}

_ROWS_A_WRITE = 300
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

#: Writes a value as JSON. One encoder for all: `json.dumps` makes one for each call.
dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False).encode


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement as each database reads it."""

    sqlite: TextClause
    postgresql: TextClause


def statement(template: str, given: Mapping[str, str] | None = None, *, postgres: str | None = None) -> Statement:
    """Make a statement.

    Parameters
    ----------
    template
        SQL with `:name` parameters. `{now}` becomes the database's clock, in seconds, and `{given}` the rows of the
        parameter `given`, a table of that name.
    given
        The columns of those rows and Postgres' types of them.
    postgres
        The template for Postgres, where it differs.
    """
    return Statement(_compose(template, "sqlite", given or {}), _compose(postgres or template, POSTGRES, given or {}))


def _compose(template: str, dialect: str, given: Mapping[str, str]) -> TextClause:
    if dialect == POSTGRES:
        columns = ", ".join(f"{name} {kind}" for name, kind in given.items())
        table = f"json_to_recordset(CAST(:given AS json)) AS given({columns})"
    else:
        columns = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in given)
        table = f"(SELECT {columns} FROM json_each(:given)) AS given"
    return text(template.replace("{now}", _NOW[dialect]).replace("{given}", table))


def run(session: Session, statement: Statement, **parameters: Any) -> list[Any]:
    """Execute a statement that returns rows in the session's transaction, and return them as named tuples.

    The driver is called directly: around a statement of 20 microseconds SQLAlchemy does 50 microseconds of work.
    """
    way = direct(session)
    try:
        return way.rows(*way.execute(statement, parameters))
    except way.error as error:
        raise driver_error(way.connection, "a statement", error) from error


def send(session: Session, statement: Statement, **parameters: Any) -> None:
    """Execute a statement of which no rows are wanted; where statements are sent ahead, without waiting for it."""
    way = direct(session)
    try:
        way.execute(statement, parameters)
    except way.error as error:
        raise driver_error(way.connection, "a statement", error) from error


def run_together(session: Session, *calls: tuple[Statement, Mapping[str, Any]]) -> list[list[Any]]:
    """Execute statements that return rows, one after the other, and return those; on Postgres in one round trip.

    Each still sees what was committed before it began, also while one before it waited.
    """
    if not is_postgres(session):
        return [run(session, call, **parameters) for call, parameters in calls]
    way = direct(session)
    try:
        with nullcontext() if way.is_ahead else way.driver.pipeline():
            cursors = [way.execute(call, parameters) for call, parameters in calls]
            # What a statement gives is known when its answer is there, which the first fetch waits for.
            return [way.rows(*each) for each in cursors]
    except way.error as error:
        raise driver_error(way.connection, "several statements", error) from error


class Direct:
    """The way to the driver of a session's only transaction."""

    __slots__ = ("_after", "_before", "connection", "driver", "error", "is_postgres")

    def __init__(self, connection: Connection) -> None:
        """Go through a connection that is in a transaction."""
        self.connection = connection
        self.driver: Any = connection.connection.driver_connection
        self.error: type[Exception] = connection.dialect.loaded_dbapi.Error
        self.is_postgres = connection.dialect.name == POSTGRES
        # Those who listen to the engine's statements hear of these too.
        self._before = list(connection.dispatch.before_cursor_execute)
        self._after = list(connection.dispatch.after_cursor_execute)

    @property
    def is_ahead(self) -> bool:
        """Whether statements are sent ahead (`PatientConnection.send_ahead`)."""
        return bool(self.is_postgres and self.driver.is_ahead)

    def execute(self, statement: Statement, parameters: Mapping[str, Any]) -> tuple[str, Any]:
        """Execute a statement; return it as the driver reads it, and its cursor."""
        if self.is_postgres:
            written = _driver_text(statement.postgresql, POSTGRES)
            cursor = self.driver.ahead_cursor() if self.driver.is_ahead else self.driver.cursor()
        else:
            written = _driver_text(statement.sqlite, "sqlite")
            cursor = self.driver.cursor()
        for hook in self._before:
            hook(self.connection, cursor, written, parameters, None, False)
        cursor.execute(written, parameters)
        for hook in self._after:
            hook(self.connection, cursor, written, parameters, None, False)
        return written, cursor

    def rows(self, written: str, cursor: Any) -> list[Any]:
        """Return what a statement gave, as named tuples."""
        rows = cursor.fetchall()
        row = _ROWS.get(written)
        if row is None:
            row = _ROWS[written] = _row_type(tuple(column[0] for column in cursor.description))
        if self.is_ahead:
            self.driver.give_back(cursor)
        return list(map(row._make, rows))


#: Statement, as a driver reads it, to the type of its rows: drivers make a description anew whenever it is looked at.
_ROWS: dict[str, Any] = {}


def direct(session: Session) -> Direct:
    """Return the way to the driver of a session's transaction."""
    found: Direct | None = session.info.get("direct")
    if found is None:
        found = session.info["direct"] = Direct(session.connection())
    return found


@cache
def _row_type(names: tuple[str, ...]) -> Any:
    return namedtuple("Row", names)


def driver_error(connection: Connection, what: str, error: Exception) -> DBAPIError:
    """Return a driver's error as SQLAlchemy raises it; a connection that is gone is not used again."""
    driver: Any = connection.connection.driver_connection
    is_gone = bool(getattr(driver, "closed", False))
    raised = DBAPIError.instance(
        what,
        None,
        error,
        connection.dialect.loaded_dbapi.Error,
        connection_invalidated=is_gone,
        dialect=connection.dialect,
    )
    if is_gone:
        connection.invalidate()
    assert isinstance(raised, DBAPIError)
    return raised


def copy_rows(session: Session, into: str, rows: Iterable[Sequence[Any]], same: Sequence[Any]) -> None:
    """Give Postgres rows for a table, "name (columns)", by COPY; it takes in some while others are still made.

    `same` are the values of the last columns, in every row.
    """
    end = "".join(f"\t{_copy_text(value)}" for value in same) + "\n"
    connection = session.connection()
    driver: Any = connection.connection.driver_connection
    left = iter(rows)
    try:
        with driver.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
            while batch := list(islice(left, _ROWS_A_WRITE)):
                copy.write(_copy_lines(batch, end))
    except connection.dialect.loaded_dbapi.Error as error:
        base = connection.dialect.loaded_dbapi.Error
        raise DBAPIError.instance(f"COPY {into}", None, error, base, dialect=connection.dialect) from error


def _copy_lines(rows: Sequence[Sequence[Any]], end: str) -> str:
    """Return rows, each with the same number of values, as COPY reads them; `end` is the end of each line."""
    text = end.join(["\t".join(map(str, row)) for row in rows]) + end
    # What has to be written otherwise is rare, and found faster in all rows than in each.
    tabs = (len(rows[0]) - 1 + end.count("\t")) * len(rows)
    is_plain = (
        text.count("\t") == tabs
        and text.count("\n") == len(rows)
        and text.count("\\") == end.count("\\") * len(rows)
        and "\r" not in text
        and not any(None in row for row in rows)
    )
    return text if is_plain else "".join("\t".join(map(_copy_text, row)) + end for row in rows)


def _copy_text(value: Any) -> str:
    return "\\N" if value is None else str(value).translate(_ESCAPED)


@cache
def _driver_text(statement: TextClause, dialect: str) -> str:
    """Return a statement with parameters as the driver writes them."""
    if dialect == POSTGRES:
        from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

        return str(statement.compile(dialect=PGDialect_psycopg()))
    from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

    return str(statement.compile(dialect=SQLiteDialect_pysqlite(paramstyle="named")))


def is_postgres(session: Session) -> bool:
    """Say whether the session's database is Postgres."""
    return direct(session).is_postgres


def rows_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows for the parameter `given`. JSON within them is given as text, so that it is stored as it was."""
    return dump(rows)


def read_json(value: Any) -> Any:
    """Return the value of a JSON column, which SQLite gives as text."""
    return json.loads(value) if isinstance(value, str) else value
