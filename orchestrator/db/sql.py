"""Statements as text that both databases read, for what is made for every task.

SQLAlchemy's expressions are built and hashed anew for each call, which for a task of a few milliseconds was most of
what the queue cost. A text is compiled once. Its parameters are few, however many rows it is about: rows come as one
JSON text (`rows_json`), which the database takes apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row
from sqlalchemy import CursorResult, TextClause, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

POSTGRES = "postgresql"
_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    # Not now(): that is the start of the transaction, which may have waited for a lock since.
    POSTGRES: "CAST(extract(epoch FROM statement_timestamp()) AS double precision)",
}

_ROWS_A_WRITE = 100
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})

#: Writes a value as JSON. One encoder for all: `json.dumps` makes one for each call.
dump = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


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


def run(session: Session, statement: Statement, **parameters: Any) -> CursorResult[Any]:
    """Execute a statement in the session's transaction."""
    return session.connection().execute(statement.postgresql if is_postgres(session) else statement.sqlite, parameters)


def run_together(session: Session, *calls: tuple[Statement, Mapping[str, Any]]) -> list[Sequence[Any]]:
    """Execute statements that return rows, one after the other, and return those; on Postgres in one round trip.

    Each still sees what was committed before it began, also while one before it waited.
    """
    if not is_postgres(session):
        return [run(session, call, **parameters).all() for call, parameters in calls]
    connection = session.connection()
    driver: Any = connection.connection.driver_connection
    try:
        with driver.pipeline():
            cursors = [
                driver.cursor(row_factory=namedtuple_row).execute(_driver_text(call.postgresql), parameters)
                for call, parameters in calls
            ]
            return [cursor.fetchall() for cursor in cursors]
    except psycopg.Error as error:
        raise DBAPIError.instance(
            "several statements", None, error, psycopg.Error, dialect=connection.dialect
        ) from error


def copy_rows(session: Session, into: str, rows: Sequence[Sequence[Any]]) -> None:
    """Give Postgres rows for a table, "name (columns)", by COPY; it takes in some while others are still written."""
    connection = session.connection()
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for start in range(0, len(rows), _ROWS_A_WRITE):
                copy.write("".join(map(_copy_line, rows[start : start + _ROWS_A_WRITE])))
    except psycopg.Error as error:
        raise DBAPIError.instance(f"COPY {into}", None, error, psycopg.Error, dialect=connection.dialect) from error


def _copy_line(row: Sequence[Any]) -> str:
    """Return a row as COPY reads it."""
    line = "\t".join(["\\N" if value is None else str(value) for value in row])
    is_plain = line.count("\t") == len(row) - 1 and line.count("\\") == row.count(None)
    if is_plain and "\n" not in line and "\r" not in line:
        return line + "\n"
    return "\t".join(["\\N" if value is None else str(value).translate(_ESCAPED) for value in row]) + "\n"


@cache
def _driver_text(statement: TextClause) -> str:
    """Return a statement with parameters as psycopg writes them."""
    return str(statement.compile(dialect=PGDialect_psycopg()))


def is_postgres(session: Session) -> bool:
    """Say whether the session's database is Postgres."""
    name: str = session.get_bind().dialect.name
    return name == POSTGRES


def rows_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows for the parameter `given`. JSON within them is given as text, so that it is stored as it was."""
    return dump(rows)


def read_json(value: Any) -> Any:
    """Return the value of a JSON column, which SQLite gives as text."""
    return json.loads(value) if isinstance(value, str) else value
