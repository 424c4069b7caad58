"""Whatever is hung, SIGTERM ends `quantmill serve` within seconds: nobody has to kill it."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator.db import engine
from orchestrator.db.session import Database, open_database
from orchestrator.errors import DatabaseUnavailableError, DatabaseUnreachableError
from tests.orchestrator.outages import postgres_only, stopped_postgres, until

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]
# Two answers and a connection, each cut short; and a machine that is busy with other tests.
SECONDS = 40.0


def start_serving(home: Path, *words: str) -> subprocess.Popen[str]:
    """Start `serve` in a process of its own; return it when it serves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTMILL", "RAY"))}
    command = [sys.executable, "-m", "orchestrator.cli", "--home", str(home), *words, "serve"]
    process = subprocess.Popen(
        command, text=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("serving ")
    return process


def end(process: subprocess.Popen[str]) -> str:
    """Tell it to end; return what it said."""
    process.send_signal(signal.SIGTERM)
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def orchestrators(database: Database) -> int:
    """Return how many orchestrators have said that they are there."""
    with database.session(read_only=True) as session:
        return int(session.execute(text("SELECT count(*) FROM orchestrators")).scalar_one())


@postgres_only
def test_serve_ends_on_a_signal_though_postgres_is_stopped(
    database: Database, database_url: str, postgres_url: str, home: Path
) -> None:
    process = start_serving(home, "--db", database_url)
    try:
        until(lambda: orchestrators(database) == 1)
        with stopped_postgres(postgres_url):
            # So long that it waits for an answer by now.
            time.sleep(2.0)
            assert "stopped by a signal" in end(process)
    finally:
        process.kill()


def test_serve_ends_on_a_signal_though_someone_keeps_sqlite_locked(cli: Cli, home: Path) -> None:
    cli("init")
    holder = sqlite3.connect(home / "quantmill.db", isolation_level=None)
    process = start_serving(home)
    try:
        until(lambda: holder.execute("SELECT count(*) FROM orchestrators").fetchone() == (1,))
        holder.execute("BEGIN IMMEDIATE")
        # Its next word about itself is due after five seconds, and waits for the lock.
        time.sleep(6.0)
        assert "stopped by a signal" in end(process)
    finally:
        process.kill()
        holder.close()


@postgres_only
def test_an_answer_that_does_not_come_is_waited_for_only_so_long(
    database: Database, database_url: str, postgres_url: str
) -> None:
    with database.session(read_only=True) as session:
        session.execute(text("SELECT 1"))
    database.patience.answer_seconds = 1.0
    with stopped_postgres(postgres_url), pytest.raises((DatabaseUnavailableError, DatabaseUnreachableError)):
        answer(database)
    database.patience.answer_seconds = 60.0
    with database.session(read_only=True) as session:
        assert session.execute(text("SELECT 1")).scalar_one() == 1
    with stopped_postgres(postgres_url):
        other = open_database(database_url)
        other.patience.answer_seconds = 1.0
        with pytest.raises(DatabaseUnreachableError, match="in time"):
            answer(other)
        other.close()


def answer(database: Database) -> None:
    """Ask for something."""
    with database.session(read_only=True) as session:
        session.execute(text("SELECT 1"))


@postgres_only
def test_an_order_to_end_cuts_a_wait_short(database: Database, postgres_url: str) -> None:
    stop = threading.Event()
    database.patience.stop = stop
    with database.session(read_only=True) as session:
        session.execute(text("SELECT 1"))
    with stopped_postgres(postgres_url):
        threading.Timer(0.5, stop.set).start()
        with pytest.raises((DatabaseUnavailableError, DatabaseUnreachableError)):
            answer(database)
    assert stop.is_set()


@postgres_only
@pytest.mark.parametrize(
    "statement", ["SELECT pg_sleep(60)", "SELECT pg_advisory_xact_lock(7)"], ids=["slow", "locked"]
)
def test_the_server_gives_up_by_itself(database: Database, statement: str) -> None:
    with database.session() as session:
        limits = text("SELECT current_setting('statement_timeout'), current_setting('lock_timeout')")
        assert tuple(session.execute(limits).one()) == ("1min", "45s")
    with database.session() as holder:
        holder.execute(text("SELECT pg_advisory_xact_lock(7)"))
        with pytest.raises(DatabaseUnavailableError, match="timeout"):
            hurried(database, statement)


def hurried(database: Database, statement: str) -> None:
    """Make a statement that the server soon gives up."""
    with database.session() as session:
        session.execute(text("SET LOCAL statement_timeout = '300ms'; SET LOCAL lock_timeout = '200ms'"))
        session.execute(text(statement))


def test_a_lock_that_stays_is_an_outage_of_sqlite(
    tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "quantmill.db"
    path.write_bytes(sqlite_template.read_bytes())
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.6)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    database = open_database(f"sqlite:///{path}")
    with pytest.raises(DatabaseUnavailableError, match="locked"), database.session() as session:
        session.execute(text("SELECT 1"))
    holder.execute("COMMIT")
    with database.session():
        pass
    database.close()
    holder.close()
