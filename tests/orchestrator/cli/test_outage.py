"""A database that goes away: at the start that is a wrong address, later it is waited out."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from orchestrator.db.jobs import cancel_job, create_job
from orchestrator.db.registry import add_model
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import Database, open_database, upgrade

Cli = Callable[..., Any]
pytestmark = pytest.mark.postgres


class Outage:
    """Takes one database of the server away from everybody, and gives it back."""

    def __init__(self, server: str, url: str) -> None:
        self._server, self._name = server, urlsplit(url).path.strip("/")

    def _set(self, *statements: str) -> None:
        with psycopg.connect(self._server, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def begin(self) -> None:
        """Refuse connections, and cut those that are open."""
        others = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'"
        self._set(f"ALTER DATABASE {self._name} WITH ALLOW_CONNECTIONS false", others)

    def end(self) -> None:
        """Accept connections again."""
        self._set(f"ALTER DATABASE {self._name} WITH ALLOW_CONNECTIONS true")


@pytest.fixture
def outage(postgres_url: str, empty_postgres_url: str) -> Outage:
    upgrade(empty_postgres_url)
    return Outage(postgres_url, empty_postgres_url)


@pytest.fixture
def database(outage: Outage, empty_postgres_url: str) -> Any:
    opened = open_database(empty_postgres_url)
    yield opened
    opened.close()
    outage.end()


@pytest.fixture
def job(database: Database) -> str:
    """A job that nobody executes."""
    with database.session() as session:
        model = add_model(session, ModelRow("model", "0" * 64, "UNet2DModel", "here", 10, 5, {"units": []}))
        return create_job(session, model=model, recipe_name="recipe", recipe={}, recipe_digest="0" * 64)


def when_waiting(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Do something once, after the first look at a job and before the second."""
    sleep, todo = time.sleep, [do]

    def after(seconds: float) -> None:
        if todo and threading.current_thread() is threading.main_thread():
            todo.pop()()
        sleep(seconds)

    monkeypatch.setattr("orchestrator.actions.jobs.time.sleep", after)


@pytest.mark.parametrize("command", [["wait"], ["logs", "-f"]])
def test_who_waits_for_a_job_waits_out_an_outage(
    cli: Cli,
    empty_postgres_url: str,
    database: Database,
    outage: Outage,
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    def come_back() -> None:
        outage.end()
        with database.session() as session:
            cancel_job(session, job)

    timer = threading.Timer(1.0, come_back)

    def go_away() -> None:
        outage.begin()
        timer.start()

    when_waiting(monkeypatch, go_away)
    answer = cli("--db", empty_postgres_url, "jobs", *command, job, "--json")
    timer.join()
    assert answer.code == (103 if command == ["wait"] else 0), answer.err
    found = answer.json
    assert (found["state"] if command == ["wait"] else found[-1]["event"]) == "cancelled"


def test_an_outage_that_outlasts_patience_is_no_bad_input(
    cli: Cli, empty_postgres_url: str, outage: Outage, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.actions.patience.PATIENCE_SECONDS", 0.5)
    when_waiting(monkeypatch, outage.begin)
    answer = cli("--db", empty_postgres_url, "jobs", "wait", job)
    assert (answer.code, "cannot be reached" in answer.err) == (1, True), answer.err


def test_a_time_limit_holds_in_an_outage_too(
    cli: Cli, empty_postgres_url: str, outage: Outage, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_away_for_a_while() -> None:
        outage.begin()
        threading.Timer(1.5, outage.end).start()

    when_waiting(monkeypatch, go_away_for_a_while)
    answer = cli("--db", empty_postgres_url, "jobs", "wait", job, "--timeout", "3", "--json")
    assert (answer.code, answer.json["state"]) == (101, "queued"), answer.err


def test_a_database_that_does_not_answer_at_the_start_is_a_wrong_address(
    cli: Cli, empty_postgres_url: str, outage: Outage, job: str
) -> None:
    outage.begin()
    answer = cli("--db", empty_postgres_url, "jobs", "wait", job)
    outage.end()
    assert answer.code == 2, answer.err


def test_doctor_does_not_wait_for_a_store_that_hangs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and says nothing; a task would wait for four minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}"),
            *(("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1")),
        ):
            monkeypatch.setenv(name, value)
        begun = time.monotonic()
        answer = cli("--store", "s3://bucket/store", "doctor", "--json")
        assert time.monotonic() - begun < 200
    (store,) = (check for check in answer.json["checks"] if check["name"] == "store")
    assert (answer.code, store["ok"], "timeout" in store["detail"]) == (1, False, True)
