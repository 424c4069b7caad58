"""Keeps every change of the tables, from outside the code: triggers in the database itself write them down.

A change is written in the transaction that makes it, so what was rolled back leaves no trace. The triggers also let a
task that had a fault run again at once: waiting is not what is tested here.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import Engine

from orchestrator.db.engine import parse_url
from orchestrator.db.models import Alias, Base, Job, Release, Result, Task
from tests.faults.history import Change, Logged

#: The tables that are watched, and the columns that are not: large, or of no matter.
TABLES: tuple[type[Base], ...] = (Task, Job, Result, Release, Alias)
_LEFT_OUT = frozenset({"params", "inputs", "recipe", "metrics", "ran", "not_before", "queued_at", "label", "work"})

# A task that waits for too few runs too soon, one that waits for too many, or is blocked and waits for none, never.
_MISCOUNTS = """
    SELECT * FROM (
        SELECT tasks.id, tasks.waiting, (
            SELECT count(*) FROM task_inputs JOIN tasks AS source ON source.seq = task_inputs.source_seq
            WHERE task_inputs.task_seq = tasks.seq AND source.state <> 'succeeded'
        ) AS missing
        FROM tasks WHERE tasks.state = 'blocked'
    ) AS counted
    WHERE waiting <> missing OR waiting = 0
"""
_SQLITE_NOW = "((julianday('now') - 2440587.5) * 86400.0)"


def install(url: str) -> None:
    """Watch a database."""
    engine = _engine(url)
    with engine.begin() as connection:
        for statement in _sqlite(connection) if engine.dialect.name == "sqlite" else _postgres():
            connection.exec_driver_sql(statement)
    engine.dispose()


def columns(table: type[Base]) -> list[str]:
    """Return the columns of a table that are written down."""
    return [column.name for column in table.__table__.columns if column.name not in _LEFT_OUT]


def _sqlite(connection: Connection) -> list[str]:
    statements = [
        "CREATE TABLE faults_changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, tx INTEGER, name TEXT, "
        "before TEXT, after TEXT)",
        "CREATE TRIGGER faults_no_wait AFTER UPDATE OF not_before ON tasks WHEN NEW.not_before > 0 "
        "BEGIN UPDATE tasks SET not_before = 0 WHERE id = NEW.id; END",
    ]
    for table in TABLES:
        name, cells = table.__tablename__, columns(table)
        rows = {
            side: "json_object(" + ", ".join(f"'{cell}', {side}.\"{cell}\"" for cell in cells) + ")"
            for side in ("OLD", "NEW")
        }
        differ = " OR ".join(f'OLD."{cell}" IS NOT NEW."{cell}"' for cell in cells)
        kinds = {"INSERT": ("", "NULL", rows["NEW"]), "DELETE": ("", rows["OLD"], "NULL")}
        kinds["UPDATE"] = (f"WHEN {differ}", rows["OLD"], rows["NEW"])
        for kind, (when, before, after) in kinds.items():
            statements.append(
                f"CREATE TRIGGER faults_{name}_{kind.lower()} AFTER {kind} ON {name} {when} BEGIN "
                f"INSERT INTO faults_changes (at, name, before, after) "
                f"VALUES ({_SQLITE_NOW}, '{name}', {before}, {after}); END"
            )
    return statements


def _postgres() -> list[str]:
    left_out = " ".join(f"- '{column}'" for column in sorted(_LEFT_OUT))
    statements = [
        "CREATE TABLE faults_changes (seq BIGSERIAL PRIMARY KEY, at DOUBLE PRECISION, tx BIGINT, name TEXT, "
        "before JSONB, after JSONB)",
        f"""CREATE FUNCTION faults_note() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE before jsonb; after jsonb;
BEGIN
  IF TG_OP <> 'INSERT' THEN before := to_jsonb(OLD) {left_out}; END IF;
  IF TG_OP <> 'DELETE' THEN after := to_jsonb(NEW) {left_out}; END IF;
  IF before IS DISTINCT FROM after THEN
    INSERT INTO faults_changes (at, tx, name, before, after)
    VALUES (extract(epoch from statement_timestamp()), txid_current(), TG_TABLE_NAME, before, after);
  END IF;
  RETURN NULL;
END $$""",
        """CREATE FUNCTION faults_no_wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.not_before := 0; RETURN NEW; END $$""",
        "CREATE TRIGGER faults_no_wait BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION faults_no_wait()",
    ]
    for table in TABLES:
        name = table.__tablename__
        statements.append(
            f"CREATE TRIGGER faults_{name} AFTER INSERT OR UPDATE OR DELETE ON {name} "
            "FOR EACH ROW EXECUTE FUNCTION faults_note()"
        )
    return statements


class Recorder:
    """Reads what the triggers wrote; its connection is its own."""

    def __init__(self, url: str) -> None:
        """Read the database at `url`, which is watched."""
        self._engine = _engine(url)

    def close(self) -> None:
        """Close the connection."""
        self._engine.dispose()

    def query(self, statement: str) -> list[dict[str, Any]]:
        """Return the rows of a query of the harness's own."""
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(statement)).mappings()]

    def miscounts(self) -> list[str]:
        """Return what is wrong at this moment with what blocked tasks count, a line for each.

        One statement, so that it sees what was committed at one time.
        """
        return [
            f"task {row['id'][:12]}: waits for {row['waiting']} tasks, {row['missing']} of what it reads are missing"
            for row in self.query(_MISCOUNTS)
        ]

    def changes(self) -> tuple[Change, ...]:
        """Return all changes."""
        rows = self.query("SELECT seq, at, tx, name, before, after FROM faults_changes ORDER BY seq")
        return tuple(
            Change(row["seq"], row["at"], row["name"], _row(row["before"]), _row(row["after"]), row["tx"])
            for row in rows
        )

    def log(self) -> tuple[Logged, ...]:
        """Return the service's own log."""
        rows = self.query("SELECT id, event, job_id, task_id, attempt, data FROM events ORDER BY id")
        return tuple(
            Logged(row["id"], row["event"], row["job_id"], row["task_id"], row["attempt"], _row(row["data"]) or {})
            for row in rows
        )

    def sets(self, table: str, of: str, members: str) -> dict[str, frozenset[str]]:
        """Return a table of pairs as sets: `members` by `of`."""
        found: dict[str, set[str]] = {}
        for row in self.query(f"SELECT {of} AS name, {members} AS member FROM {table}"):
            found.setdefault(row["name"], set()).add(row["member"])
        return {name: frozenset(each) for name, each in found.items()}

    def sources(self) -> dict[str, frozenset[str]]:
        """Return the tasks that each task reads."""
        return self.sets(
            "task_inputs JOIN tasks AS reader ON reader.seq = task_seq JOIN tasks AS source ON source.seq = source_seq",
            "reader.id",
            "source.id",
        )


def _engine(url: str) -> Engine:
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return create_engine(parsed, connect_args={"timeout": 60})
    return create_engine(parsed, connect_args={"application_name": "faults", "connect_timeout": 10})


def _row(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    found: dict[str, Any] = json.loads(value) if isinstance(value, str) else value
    return found
