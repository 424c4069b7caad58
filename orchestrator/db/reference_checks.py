"""References of the tables that grow with every task, checked a statement at a time.

On Postgres a foreign key looks each row up by itself: 8 µs a key, with two keys for every edge of a task graph most of
what enqueueing took. For these tables triggers do the same for all rows of a statement at once: rows refer to tasks and
jobs that exist, what is referred to is not removed, and no reference is changed. On SQLite they are foreign keys,
which cost little there. Migration 2026.12.0 makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import DDL, ForeignKeyConstraint, MetaData, Table, event

#: Table and column, and the table whose `id` it holds.
REFERENCES = (
    ("task_inputs", "task_id", "tasks"),
    ("task_inputs", "source_id", "tasks"),
    ("job_tasks", "job_id", "jobs"),
    ("job_tasks", "task_id", "tasks"),
    ("events", "job_id", "jobs"),
    ("events", "task_id", "tasks"),
)
_TABLES = tuple(dict.fromkeys(table for table, _, _ in REFERENCES))
_TARGETS = tuple(dict.fromkeys(target for _, _, target in REFERENCES))


def reference(table: str, column: str) -> ForeignKeyConstraint:
    """Return the constraint of one of `REFERENCES` for SQLite."""
    target = next(target for name, held, target in REFERENCES if (name, held) == (table, column))
    key = ForeignKeyConstraint([column], [f"{target}.id"], name=f"fk_{table}_{column}")
    return key.ddl_if(dialect="sqlite")


def create_checks() -> list[str]:
    """Return the statements that make functions and triggers on Postgres, once the tables are there."""
    return [
        *(_checks_added(table) for table in _TABLES),
        *(_checks_removed(target) for target in _TARGETS),
        _refuses_change(),
        *(_add_trigger(table) for table in _TABLES),
        *(_remove_trigger(target) for target in _TARGETS),
        *(_change_trigger(table, [name for owner, name, _ in REFERENCES if owner == table]) for table in _TABLES),
        *(_change_trigger(target, ["id"]) for target in _TARGETS),
    ]


def drop_checks() -> list[str]:
    """Return the statements that undo `create_checks`, whether or not the tables are there."""
    functions = [
        *(f"{table}_refer" for table in _TABLES),
        *(f"{target}_stay" for target in _TARGETS),
        "references_stay",
    ]
    return [f"DROP FUNCTION IF EXISTS {name} CASCADE" for name in functions]


def add_to(metadata: MetaData) -> None:
    """Let `create_all` make them too, and `drop_all` drop them."""
    tables: list[Table] = metadata.sorted_tables
    for statement in create_checks():
        event.listen(metadata, "after_create", DDL(_quoted(statement)).execute_if(dialect="postgresql"))
    for statement in drop_checks():
        event.listen(metadata, "before_drop", DDL(_quoted(statement)).execute_if(dialect="postgresql"))
    assert {*_TABLES, *_TARGETS} <= {table.name for table in tables}


def _quoted(statement: str) -> str:
    return statement.replace("%", "%%")


def _checks_added(table: str) -> str:
    looks = "".join(
        f"""
        SELECT added.{column} INTO missing FROM added
        WHERE added.{column} IS NOT NULL
          AND NOT EXISTS (SELECT 1 FROM {target} WHERE {target}.id = added.{column}) LIMIT 1;
        IF FOUND THEN
            RAISE foreign_key_violation USING TABLE = '{table}', COLUMN = '{column}',
                MESSAGE = '{table}.{column}: got ' || missing || ', wanted one of {target}';
        END IF;"""
        for owner, column, target in REFERENCES
        if owner == table
    )
    return f"""
    CREATE FUNCTION {table}_refer() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE missing text;
    BEGIN{looks}
        RETURN NULL;
    END $$"""


def _checks_removed(target: str) -> str:
    # The lock waits for those who add references, and keeps others from adding any before this commits.
    locked = ", ".join(dict.fromkeys(owner for owner, _, held in REFERENCES if held == target))
    looks = "".join(
        f"""
        IF EXISTS (SELECT 1 FROM removed JOIN {owner} ON {owner}.{column} = removed.id) THEN
            RAISE foreign_key_violation USING TABLE = '{owner}', COLUMN = '{column}',
                MESSAGE = '{target}: got a row to remove that {owner}.{column} refers to';
        END IF;"""
        for owner, column, held in REFERENCES
        if held == target
    )
    return f"""
    CREATE FUNCTION {target}_stay() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        LOCK TABLE {locked} IN SHARE MODE;{looks}
        RETURN NULL;
    END $$"""


def _refuses_change() -> str:
    return """
    CREATE FUNCTION references_stay() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE foreign_key_violation USING TABLE = TG_TABLE_NAME,
            MESSAGE = TG_TABLE_NAME || ': got a change of a reference or of what is referred to, wanted none';
    END $$"""


def _add_trigger(table: str) -> str:
    return (
        f"CREATE TRIGGER {table}_refer AFTER INSERT ON {table} REFERENCING NEW TABLE AS added "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refer()"
    )


def _remove_trigger(target: str) -> str:
    return (
        f"CREATE TRIGGER {target}_stay AFTER DELETE ON {target} REFERENCING OLD TABLE AS removed "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {target}_stay()"
    )


def _change_trigger(table: str, columns: Sequence[str]) -> str:
    changed = " OR ".join(f"OLD.{column} IS DISTINCT FROM NEW.{column}" for column in columns)
    return (
        f"CREATE TRIGGER {table}_keep BEFORE UPDATE OF {', '.join(columns)} ON {table} "
        f"FOR EACH ROW WHEN ({changed}) EXECUTE FUNCTION references_stay()"
    )
