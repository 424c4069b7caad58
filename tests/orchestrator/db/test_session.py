"""Transactions, the clock, what the databases enforce, and errors that a person can read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.limits import Patience
from orchestrator.db.session import Database, Session, current, open_database, upgrade
from orchestrator.db.sql import run, send, statement
from orchestrator.errors import DatabaseError, DatabaseFullError, DatabaseUnreachableError
from quant_spec.errors import InvalidInputError

Driver = Any  # the fixture's class lives in conftest.py
ON_SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("backend", ["postgres"], indirect=True)
TIMING = "INSERT INTO kind_timings (kind, version, n, seconds, work) VALUES (:kind, 1, 1, 2.0, 3.0)"


def timings(database: Database) -> int:
    with database.session(read_only=True) as session:
        return int(session.scalar(text("SELECT count(*) FROM kind_timings")) or 0)


def test_session_commits_at_the_end_of_its_block(database: Database) -> None:
    with database.session() as session:
        session.execute(text(TIMING), {"kind": "noop"})
    assert timings(database) == 1


def test_session_rolls_back_on_any_error(database: Database) -> None:
    def interrupted(error: BaseException) -> None:
        with database.session() as session:
            session.execute(text(TIMING), {"kind": "noop"})
            raise error

    for error in (ValueError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            interrupted(error)
    assert timings(database) == 0


def test_session_converts_the_driver_s_errors(database: Database) -> None:
    def failing() -> None:
        with database.session() as session:
            session.execute(text(TIMING), {"kind": "noop"})
            session.execute(text("SELECT nonsense"))

    with pytest.raises(DatabaseError, match="nonsense") as error:
        failing()
    assert isinstance(error.value.__cause__, SQLAlchemyError)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    assert timings(database) == 0


def test_the_clock_is_that_of_the_database_in_seconds(database: Database) -> None:
    readings: list[Any] = []
    for _ in range(3):
        before = time.time()
        with database.session(read_only=True) as session:
            first = session.scalar(select(epoch_seconds()))
            time.sleep(0.02)
            readings += [first, session.scalar(select(epoch_seconds()))]
        assert before - 0.01 <= readings[-2] <= time.time() + 0.01
    assert readings == sorted(readings)
    # It goes on within a transaction, which may have waited for a lock.
    assert readings[1] - readings[0] >= 0.01


@ON_SQLITE
def test_sqlite_is_set_up_to_be_shared(database: Database) -> None:
    with database.session() as session:
        settings = {
            name: session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 250}


@ON_SQLITE
def test_sqlite_writers_take_turns_and_readers_do_not_wait(database: Database) -> None:
    order: list[str] = []

    def write() -> None:
        with database.session() as session:
            session.execute(text(TIMING), {"kind": "second"})
            order.append("second")

    with database.session() as session:
        session.execute(text(TIMING), {"kind": "first"})
        second = threading.Thread(target=write)
        second.start()
        assert timings(database) == 0
        time.sleep(0.2)
        order.append("first")
    second.join()
    assert order == ["first", "second"]
    assert timings(database) == 2


@ON_POSTGRES
def test_postgres_ends_transactions_whose_owner_is_gone(database: Database) -> None:
    with database.session() as session:
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"


@ON_POSTGRES
def test_postgres_refuses_to_write_in_a_read_only_session(database: Database) -> None:
    def write() -> None:
        with database.session(read_only=True) as session:
            session.execute(text(TIMING), {"kind": "noop"})

    with pytest.raises(DatabaseError, match="read-only transaction"):
        write()
    with database.session() as session:
        session.execute(text(TIMING), {"kind": "noop"})


@ON_POSTGRES
def test_a_database_that_restarts_costs_one_error_at_most(database: Database, postgres_url: str) -> None:
    assert timings(database) == 0
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s",
            [database.location.database],
        )
    assert timings(database) == 0


# Statements that nobody waits for

MODELS = statement("SELECT name FROM models")


def test_statements_that_are_sent_ahead_mix_with_all_others(database: Database) -> None:
    with database.session(ahead=True) as session:
        send(session, statement(MODEL))
        assert session.scalar(text("SELECT count(*) FROM models")) == 1
        send(session, statement("UPDATE models SET name = 'n'"))
        assert [row.name for row in run(session, MODELS)] == ["n"]
        send(session, statement("UPDATE models SET name = 'o'"))
    with database.session(read_only=True) as session:
        assert [row.name for row in run(session, MODELS)] == ["o"]


@pytest.mark.parametrize("then", ["the end", "another statement", "an error of the caller's"])
def test_an_error_of_what_is_sent_ahead_undoes_all(database: Database, then: str) -> None:
    def work(session: Session) -> None:
        send(session, statement(MODEL))
        send(session, statement(MODEL))
        if then == "another statement":
            run(session, MODELS)
        elif then == "an error of the caller's":
            raise KeyError(then)

    # On SQLite the second statement fails where it is made.
    with pytest.raises((KeyError, DatabaseError)), database.session(ahead=True) as session:
        work(session)
    with database.session(ahead=True) as session:
        assert run(session, MODELS) == []


@ON_POSTGRES
def test_nobody_waits_for_what_is_sent_ahead(database: Database) -> None:
    lock = statement("SELECT pg_advisory_xact_lock(1)")
    with database.session(ahead=True) as session:
        with database.session() as other:
            run(other, lock)
            # It would never come back if it waited.
            send(session, lock)
        assert len(run(session, statement("SELECT 1 AS one"))) == 1


@pytest.mark.postgres
@pytest.mark.parametrize("loss", ["silence", "an end"])
def test_several_statements_that_get_no_answer_leave_nothing_behind(postgres_url: str, loss: str) -> None:
    from orchestrator.db.postgres import PatientConnection

    statement = {"silence": "SELECT pg_sleep(30)", "an end": "SELECT pg_terminate_backend(pg_backend_pid())"}[loss]
    with PatientConnection.connect(postgres_url) as connection:
        connection.patience = Patience(0.2)
        # What is left behind and fails when it is collected is an error of this test, by pytest's own watch.
        with pytest.raises(psycopg.OperationalError), connection.pipeline():
            connection.cursor().execute(statement).fetchone()
        assert connection.closed


# What the tables do not take

TASK = {
    "id": "'a'", "kind": "'noop'", "version": "1", "params": "'{}'", "inputs": "'{}'", "cpus": "1", "gpus": "0",
    "memory_bytes": "0", "work": "0", "label": "''", "state": "'blocked'", "waiting": "0", "priority": "0",
    "not_before": "0", "attempt": "0", "faults_task": "0", "faults_infrastructure": "0",
}  # fmt: skip
LEASE = {"lease_token": "'t'", "lease_owner": "'o'", "lease_until": "1"}
JOB = {
    "id": "'j'", "state": "'queued'", "priority": "0", "model_name": "'m'", "model_digest": "'d'", "recipe_name": "'r'",
    "recipe_digest": "'d'", "recipe": "'{}'", "created_at": "1",
}  # fmt: skip
MODEL = "INSERT INTO models VALUES ('m', 'd', 'UNet2DModel', 'here', 1, 1, '{}', 1)"


def insert(table: str, values: dict[str, str]) -> str:
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(values.values())})"


WRONG = {
    "state": insert("tasks", TASK | {"state": "'resting'"}),
    "running without a lease": insert("tasks", TASK | {"state": "'running'", "key": "'k'"}),
    "running without an owner": insert(
        "tasks", TASK | LEASE | {"state": "'running'", "key": "'k'", "lease_owner": "NULL"}
    ),
    "running without an end": insert(
        "tasks", TASK | LEASE | {"state": "'running'", "key": "'k'", "lease_until": "NULL"}
    ),
    "a lease on a queued task": insert("tasks", TASK | LEASE | {"state": "'queued'", "key": "'k'"}),
    "queued without a key": insert("tasks", TASK | {"state": "'queued'"}),
    "queued and waiting": insert("tasks", TASK | {"state": "'queued'", "key": "'k'", "waiting": "1"}),
    "waiting for less than nothing": insert("tasks", TASK | {"waiting": "-1"}),
    "failed without an error": insert("tasks", TASK | {"state": "'failed'"}),
    "negative resources": insert("tasks", TASK | {"gpus": "-1"}),
    "two of an id": insert("tasks", TASK) + ";" + insert("tasks", TASK),
    "a key running twice": ";".join(
        insert("tasks", TASK | LEASE | {"state": "'running'", "key": "'k'", "id": name}) for name in ("'a'", "'b'")
    ),
    "an edge to nothing": insert("task_inputs", {"task_seq": "1", "source_seq": "2"}),
    "an event of nothing": insert("events", {"at": "1", "event": "'e'", "data": "'{}'"}),
    "an alias of nothing": insert("aliases", {"name": "'n'", "alias": "'a'", "version": "1"}),
    "job state": f"{MODEL};" + insert("jobs", JOB | {"state": "'blocked'"}),
    "a job of no model": insert("jobs", JOB),
    "ended without a time": f"{MODEL};" + insert("jobs", JOB | {"state": "'succeeded'"}),
    "active with an end": f"{MODEL};" + insert("jobs", JOB | {"finished_at": "1"}),
    "a job failed without an error": f"{MODEL};" + insert("jobs", JOB | {"state": "'failed'", "finished_at": "1"}),
    "a release of an active job": f"{MODEL};" + insert("jobs", JOB | {"release": "'n@1'"}),
}


def test_the_tables_refuse_what_must_not_be(database: Database) -> None:
    def run(statements: str) -> None:
        with database.session() as session:
            for statement in statements.split(";"):
                session.execute(text(statement))

    taken = []
    for name, statements in WRONG.items():
        try:
            run(statements)
        except DatabaseError as error:
            taken += [] if "constraint" in str(error) else [f"{name}: {error}"]
        else:
            taken.append(name)
    assert taken == []
    run(MODEL + ";" + insert("jobs", JOB) + ";" + insert("tasks", TASK))


# Databases that are not there


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://host/name", "sqlite://", "sqlite:///:memory:", "/a/path.db"])
def test_open_database_refuses_what_is_no_database_url(url: str) -> None:
    with pytest.raises(
        InvalidInputError, match=r"database URL: got .*, wanted sqlite:////.* or postgresql://"
    ) as error:
        open_database(url)
    assert error.value.exit_code == 2


def test_a_password_is_shown_to_nobody() -> None:
    with pytest.raises(InvalidInputError) as error:
        open_database("mysql://user:secret@host/name")
    assert "secret" not in str(error.value)
    database = open_database("postgresql://user:secret@127.0.0.1:1/name")
    with pytest.raises(DatabaseUnreachableError, match="cannot be reached") as unreachable:
        timings(database)
    assert "secret" not in str(unreachable.value)
    assert unreachable.value.exit_code == 2
    assert "secret" in database.url
    database.close()


def test_a_sqlite_file_comes_into_being_by_upgrade_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    database = open_database(url)
    with pytest.raises(DatabaseUnreachableError, match="unable to open database file"):
        timings(database)
    assert current(url).revision is None
    assert list(tmp_path.iterdir()) == []
    upgrade(url)
    assert timings(database) == 0
    database.close()


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 1000)
    calls: list[Callable[[], Any]] = [
        lambda: timings(open_database(f"sqlite:///{path}")),
        lambda: current(f"sqlite:///{path}"),
        lambda: upgrade(f"sqlite:///{path}"),
    ]
    for call in calls:
        with pytest.raises(DatabaseUnreachableError, match="file is not a database"):
            call()
    assert path.read_text() == "not a database " * 1000
    with pytest.raises(DatabaseUnreachableError, match="cannot make its folder"):
        upgrade(f"sqlite:///{path}/below/quantmill.db")


@ON_SQLITE
def test_a_full_disk_is_said_and_changes_nothing(queue: Driver) -> None:
    queue.submit([queue.node("first")])
    before = queue.snapshot()

    def fill() -> None:
        with queue.database.session() as session:
            pages = session.scalar(text("PRAGMA page_count"))
            session.execute(text(f"PRAGMA max_page_count = {pages + 2}"))
            for number in range(1000):
                session.execute(text(TIMING), {"kind": "x" * 1000 + str(number)})

    with pytest.raises(DatabaseFullError, match="no room left, nothing was changed") as error:
        fill()
    assert error.value.exit_code == 2
    queue.database.close()
    assert queue.snapshot() == before


def test_a_sqlite_path_may_hold_odd_characters(tmp_path: Path) -> None:
    path = tmp_path / "a folder with # % and ü" / "the file.db"
    url = f"sqlite:///{path}"
    upgrade(url)
    database = open_database(url)
    assert timings(database) == 0
    database.close()
    assert path.is_file()
