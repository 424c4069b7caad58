"""References of the tables that grow with every task, checked a statement at a time.

On Postgres a foreign key looks each row up by itself: 8 µs a key, with two keys for every edge of a task graph most of
what enqueueing took. For these tables triggers do the same for all rows of a statement at once: rows refer to tasks and
jobs that exist, what is referred to is not removed, and no reference is changed. On SQLite they are foreign keys,
which cost little there. Migrations make them, since 2026.12.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from sqlalchemy import DDL, ForeignKeyConstraint, MetaData, Table, event


class Reference(NamedTuple):
    """A column that holds what a column of another table, the key, does."""

    table: str
    column: str
    target: str
    key: str = "id"


REFERENCES = (
    Reference("task_inputs", "task_seq", "tasks", "seq"),
    Reference("task_inputs", "source_seq", "tasks", "seq"),
    Reference("job_tasks", "job_id", "jobs"),
    Reference("job_tasks", "task_id", "tasks"),
    Reference("events", "job_id", "jobs"),
    Reference("events", "task_id", "tasks"),
)


def reference(table: str, column: str) -> ForeignKeyConstraint:
    """Return the constraint of one of `REFERENCES` for SQLite."""
    found = next(each for each in REFERENCES if (each.table, each.column) == (table, column))
    key = ForeignKeyConstraint([column], [f"{found.target}.{found.key}"], name=f"fk_{table}_{column}")
    return key.ddl_if(dialect="sqlite")


def create_checks(references: Sequence[Reference] = REFERENCES) -> list[str]:
    """Return the statements that make functions and triggers on Postgres, once the tables are there."""
    of_table, of_target = _by(references, "table"), _by(references, "target")
    return [
        *(_checks_added(table, each) for table, each in of_table.items()),
        *(_checks_removed(target, each) for target, each in of_target.items()),
        _refuses_change(),
        *(_add_trigger(table) for table in of_table),
        *(_remove_trigger(target) for target in of_target),
        *(_change_trigger(table, [ref.column for ref in each]) for table, each in of_table.items()),
        *(_change_trigger(target, list(dict.fromkeys(ref.key for ref in each))) for target, each in of_target.items()),
    ]


def _by(references: Sequence[Reference], name: Literal["table", "target"]) -> dict[str, list[Reference]]:
    groups: dict[str, list[Reference]] = {}
    for each in references:
        groups.setdefault(getattr(each, name), []).append(each)
    return groups


def drop_checks(references: Sequence[Reference] = REFERENCES) -> list[str]:
    """Return the statements that undo `create_checks`, whether or not the tables are there."""
    functions = [
        *(f"{table}_refer" for table in _by(references, "table")),
        *(f"{target}_stay" for target in _by(references, "target")),
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
    assert {name for each in REFERENCES for name in (each.table, each.target)} <= {table.name for table in tables}


def _quoted(statement: str) -> str:
    return statement.replace("%", "%%")


def _checks_added(table: str, references: Sequence[Reference]) -> str:
    looks = "".join(
        f"""
        SELECT added.{column} INTO missing FROM added
        WHERE added.{column} IS NOT NULL
          AND NOT EXISTS (SELECT 1 FROM {target} WHERE {target}.{key} = added.{column}) LIMIT 1;
        IF FOUND THEN
            RAISE foreign_key_violation USING TABLE = '{table}', CONSTRAINT = 'fk_{table}_{column}',
                MESSAGE = 'foreign key constraint fk_{table}_{column}: got ' || missing || ', wanted one of {target}';
        END IF;"""
        for _, column, target, key in references
    )
    return f"""
    CREATE FUNCTION {table}_refer() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE missing text;
    BEGIN{looks}
        RETURN NULL;
    END $$"""


def _checks_removed(target: str, references: Sequence[Reference]) -> str:
    # The lock waits for those who add references, and keeps others from adding any before this commits.
    locked = ", ".join(dict.fromkeys(each.table for each in references))
    looks = "".join(
        f"""
        IF EXISTS (SELECT 1 FROM removed JOIN {owner} ON {owner}.{column} = removed.{key}) THEN
            RAISE foreign_key_violation USING TABLE = '{owner}', CONSTRAINT = 'fk_{owner}_{column}',
                MESSAGE = 'foreign key constraint fk_{owner}_{column}: got one of {target} to remove that it refers to';
        END IF;"""
        for owner, column, _, key in references
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
        RAISE foreign_key_violation USING TABLE = TG_TABLE_NAME, MESSAGE = 'foreign key constraints of '
            || TG_TABLE_NAME || ': got a change of a reference or of what is referred to, wanted none';
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
