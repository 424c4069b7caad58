"""The schema: made by migrations alone, the same as the models say, on both databases."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from orchestrator.db.models import REVISIONS, Base
from orchestrator.db.session import (
    Database,
    SchemaState,
    current,
    migrations_folder,
    open_database,
    require_current,
    run_alembic,
    upgrade,
)
from orchestrator.errors import SchemaError
from orchestrator.states import JobState, TaskState


@pytest.fixture
def empty(empty_url: str, tmp_path: Path) -> Iterator[Database]:
    """An open database that has no schema."""
    if empty_url.startswith("sqlite"):
        path = tmp_path / "new" / "quantmill.db"
        path.parent.mkdir()
        path.touch()
    database = open_database(empty_url)
    yield database
    database.close()


def schema(connection: Connection) -> dict[str, Any]:
    """Describe the tables as the database itself does."""
    look = inspect(connection)
    tables = [table for table in look.get_table_names() if table != "alembic_version"]
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        statements = {row.name: row.sql for row in rows if row.name != "alembic_version"}
        # A column that was added later stands in one line with the one before it.
        return {
            name: sorted(part.strip(" ,\t") for part in re.split(r"\n|, (?![^()]*\))", sql) if part.strip(" ,\t"))
            for name, sql in statements.items()
        }
    indexes = connection.execute(text("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"))
    triggers = connection.execute(
        text("SELECT tgname, pg_get_triggerdef(oid) AS made FROM pg_trigger WHERE NOT tgisinternal")
    )
    functions = connection.execute(
        text("SELECT proname, prosrc FROM pg_proc WHERE pronamespace = CAST('public' AS regnamespace)")
    )
    return {
        "triggers": {row.tgname: row.made for row in triggers},
        "functions": {row.proname: row.prosrc for row in functions},
        "indexes": {row.indexname: row.indexdef for row in indexes if "alembic" not in row.indexname},
        "columns": {table: sorted(map(describe_column, look.get_columns(table))) for table in tables},
        "checks": {table: sorted(map(repr, look.get_check_constraints(table))) for table in tables},
        "foreign": {table: sorted(map(repr, look.get_foreign_keys(table))) for table in tables},
    }


def comparable(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
    """Leave out what alembic cannot read back from SQLite: indexes with DESC, which `schema` compares."""
    return not (kind == "index" and str(name).startswith("ix_tasks_queued"))


def on_postgres(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
    """Leave out foreign keys that are triggers there, which `schema` compares."""
    return not (kind == "foreign_key_constraint" and item.table.name in ("task_inputs", "job_tasks", "events"))


def describe_column(column: Any) -> str:
    details = (column["nullable"], column["default"], column.get("identity"), column["autoincrement"])
    return f"{column['name']} {column['type']} {details}"


def test_migrations_make_exactly_what_the_models_say(empty: Database) -> None:
    with empty.engine.begin() as connection:
        Base.metadata.create_all(connection)
        wanted = schema(connection)
        Base.metadata.drop_all(connection)
    with empty.engine.begin() as connection:
        run_alembic(connection, REVISIONS[-1])
        assert schema(connection) == wanted
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "autogenerate skipping.*expression-based index")
            options = {
                "compare_type": True,
                "include_object": comparable if connection.dialect.name == "sqlite" else on_postgres,
            }
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, Base.metadata) == []


def test_migrations_go_down_and_up_again(empty: Database) -> None:
    with empty.engine.begin() as connection:
        run_alembic(connection, REVISIONS[-1])
        first = schema(connection)
        assert first
    for revision in (*reversed(REVISIONS[:-1]), "base"):
        with empty.engine.begin() as connection:
            run_alembic(connection, revision)
    with empty.engine.begin() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    for revision in REVISIONS:
        with empty.engine.begin() as connection:
            run_alembic(connection, revision)
    with empty.engine.begin() as connection:
        assert schema(connection) == first


def test_timings_of_an_older_database_are_kept_as_those_of_cpus(empty: Database) -> None:
    with empty.engine.begin() as connection:
        run_alembic(connection, "2026.11.0")
        connection.execute(text("INSERT INTO kind_timings VALUES ('noop', 1, 5, 2.0, 3.0)"))
        run_alembic(connection, "2026.12.0")
        assert connection.execute(text("SELECT kind, n, device FROM kind_timings")).all() == [("noop", 5, "cpu")]
        assert connection.scalar(text("SELECT count(*) FROM service WHERE length(id) = 32")) == 1
        run_alembic(connection, "2026.11.0")
        assert connection.execute(text("SELECT n FROM kind_timings")).all() == [(5,)]


def test_edges_of_an_older_database_are_kept(empty: Database) -> None:
    read = text(
        "SELECT reader.id, source.id AS source, places FROM task_inputs JOIN tasks AS reader ON reader.seq = task_seq "
        "JOIN tasks AS source ON source.seq = source_seq"
    )
    task = "INSERT INTO tasks ({}) VALUES ({})"
    values = {"kind": "'noop'", "params": "'{}'", "inputs": "'{}'", "label": "''", "state": "'blocked'"}
    values |= dict.fromkeys(
        ("version", "cpus", "gpus", "memory_bytes", "work", "waiting", "priority", "not_before", "attempt"), "0"
    )
    values |= {"faults_task": "0", "faults_infrastructure": "0"}
    with empty.engine.begin() as connection:
        run_alembic(connection, "2026.12.0")
        for name in ("z", "a"):
            columns = values | {"id": f"'{name}'"}
            connection.execute(text(task.format(", ".join(columns), ", ".join(columns.values()))))
        connection.execute(text("INSERT INTO task_inputs VALUES ('z', 'a', '[[\"x\", 0, \"out\"]]')"))
    with empty.engine.begin() as connection:
        run_alembic(connection, "2026.12.1")
        (row,) = connection.execute(read).all()
        assert (row.id, row.source) == ("z", "a")
        assert row.places in ([["x", 0, "out"]], '[["x", 0, "out"]]')
        run_alembic(connection, "2026.12.0")
        edges = connection.execute(text("SELECT task_id, source_id FROM task_inputs WHERE places IS NOT NULL"))
        assert edges.all() == [("z", "a")]


def test_a_migration_that_fails_leaves_nothing_behind(empty: Database) -> None:
    with empty.engine.begin() as connection:
        connection.execute(text("CREATE TABLE aliases (name text)"))
    with pytest.raises(Exception, match="already exists"), empty.engine.begin() as connection:
        run_alembic(connection, REVISIONS[-1])
    with empty.engine.begin() as connection:
        assert inspect(connection).get_table_names() == ["aliases"]


def test_revisions_are_those_of_the_migrations_and_named_by_release() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    scripts = list(ScriptDirectory.from_config(config).walk_revisions())
    assert tuple(script.revision for script in reversed(scripts)) == REVISIONS
    for script in scripts:
        assert re.fullmatch(r"20\d\d\.\d+\.\d+", script.revision)
        assert Path(script.path).stem == "v" + script.revision.replace(".", "_")


def test_enum_synced(database: Database) -> None:
    for table, states in (("jobs", JobState), ("tasks", TaskState)):
        with database.session(read_only=True) as session:
            checks = inspect(session.connection()).get_check_constraints(table)
        (check,) = [check["sqltext"] for check in checks if check["name"] == f"ck_{table}_state"]
        assert set(re.findall(r"'(\w+)'", str(check))) == {state.value for state in states}


# upgrade, current, require_current


def test_upgrade_makes_a_database_and_is_idempotent(empty_url: str) -> None:
    head = REVISIONS[-1]
    assert current(empty_url) == SchemaState(None, head)
    if empty_url.startswith("sqlite"):
        assert not Path(empty_url.removeprefix("sqlite:///")).parent.exists()
    database = open_database(empty_url)
    with pytest.raises(SchemaError, match=r"got no schema, wanted .*; run quantmill init or quantmill db upgrade"):
        require_current(database)
    assert upgrade(empty_url) == SchemaState(head, head)
    require_current(database)
    with database.session() as session:
        session.execute(
            text("INSERT INTO kind_timings (kind, version, n, seconds, work) VALUES ('noop', 1, 1, 2.0, 3.0)")
        )
    assert upgrade(empty_url) == current(empty_url) == SchemaState(head, head)
    with database.session(read_only=True) as session:
        assert session.scalar(text("SELECT count(*) FROM kind_timings")) == 1
    database.close()


def test_a_database_of_a_newer_quantmill_is_refused_and_left_alone(database: Database) -> None:
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '2099.1.0'"))
    for refuse in (lambda: require_current(database), lambda: upgrade(database.url)):
        with pytest.raises(SchemaError, match=r"got schema 2099.1.0 of a newer Quantmill, wanted .*; upgrade") as error:
            refuse()
        assert error.value.exit_code == 2
    assert current(database.url) == SchemaState("2099.1.0", REVISIONS[-1])


def test_a_database_that_is_behind_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.db.session.REVISIONS", (*REVISIONS, "2099.1.0"))
    with pytest.raises(SchemaError, match=rf"got schema {REVISIONS[-1]}, wanted 2099.1.0; run quantmill db upgrade"):
        require_current(database)


def test_upgrade_by_many_threads_at_once_makes_one_schema(empty_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(upgrade, [empty_url] * 4))
    assert set(states) == {current(empty_url)}


def test_upgrade_by_many_processes_at_once_makes_one_schema(empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        states = pool.map(upgrade, [empty_url] * 3)
    assert set(states) == {current(empty_url)}


def test_importing_the_queries_imports_no_alembic() -> None:
    code = "import sys, orchestrator.db.queries, orchestrator.db.session; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=migrations_folder().parent, check=False).returncode == 0
