"""No part of a password is shown, on any stream, by any command, however malformed the URL is that holds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.db.engine import parse_url

Cli = Callable[..., Any]

# Passwords are made of these two, joined by what may have to be quoted.
PARTS = re.compile("(?i)hush|quiet")
DATABASES = [
    "postgresql://user:hush@127.0.0.1:1/qm",
    "postgresql://user:hush@nosuchhost.invalid/qm",
    "postgresql://user:hush%40quiet%2F@127.0.0.1:1/qm",
    "postgresql://user:hush@quiet/rd@127.0.0.1:1/qm",
    "postgresql://user:hush@quiet@127.0.0.1:1/qm",
    "postgresql://user:hush/quiet@127.0.0.1:1/qm",
    "postgresql://user:hush:quiet@127.0.0.1:1/qm",
    "postgresql://user:hush?quiet@127.0.0.1:1/qm",
    "postgresql://user:hush#quiet@127.0.0.1:1/qm",
    "postgresql://user:hush quiet@127.0.0.1:1/qm",
    "postgresql://user:hush'quiet@127.0.0.1:1/qm",
    "postgresql://user:hush%quiet@127.0.0.1:1/qm",
    "postgresql://user:hush[quiet@127.0.0.1:1/qm",
    "postgresql://us/er:hush@127.0.0.1:1/qm",
    "postgresql://user:hush/qm",
    "postgresql://user:hush@127.0.0.1:quiet/qm",
    "postgresql:///user:hush@127.0.0.1:1/qm",
    "postgresql:/user:hush@127.0.0.1:1/qm",
    "postgresql//user:hush@127.0.0.1:1/qm",
    "postgres ://user:hush@127.0.0.1:1/qm",
    "user:hush@127.0.0.1:1/qm",
    "//user:hush@127.0.0.1:1/qm",
    "postgresql://127.0.0.1:1/qm?user=me&password=hush",
    "postgresql://127.0.0.1:1/qm?password=hush@quiet",
    "postgresql://127.0.0.1:1/qm?password=hush&quiet=1",
    "postgresql://127.0.0.1:1/qm?sslpassword=hush&application_name=hush",
    "mysql://user:hush@127.0.0.1:1/qm",
    "mysql://user:hush@quiet@127.0.0.1:1/qm",
    "sqlite://user:hush@127.0.0.1/qm.db",
]
STORES = [
    "s3://KEY:hush@bucket/prefix",
    "s3://KEY:hush/quiet@bucket/prefix",
    "ftp://user:hush@host/x",
    "ftp://user:hush@quiet/x@host/x",
]


def assert_silent(answer: Any, code: int) -> None:
    """Check the exit code, and that nothing of a password was written."""
    assert answer.code == code, answer
    assert not PARTS.search(answer.out + answer.err), answer


@pytest.mark.parametrize("url", DATABASES)
def test_of_a_database(cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = cli("--db", url, "init")
    assert_silent(refused, 2)
    (line,) = refused.err.splitlines()
    assert line.startswith("error: database")
    monkeypatch.setenv("QUANTMILL_DB", url)
    for words in (["jobs", "ls", "--json"], ["db", "upgrade"], ["serve", "--drain"]):
        assert_silent(cli(*words), 2)


def test_by_the_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # Once: it starts a Python with torch.
    monkeypatch.setenv("QUANTMILL_DB", DATABASES[3])
    monkeypatch.setenv("QUANTMILL_STORE", STORES[1])
    answer = cli("doctor", "--json")
    assert_silent(answer, 1)
    bad = {check["name"] for check in answer.json["checks"] if not check["ok"]}
    assert bad == {"database", "orchestrators", "nodes", "store"}


def test_how_to_quote_is_said(cli: Cli) -> None:
    refused = cli("--db", DATABASES[3], "init")
    assert "got 'postgresql://***', wanted postgresql://user@host/name, in a password %40 for @, " in refused.err


@pytest.mark.parametrize("url", STORES)
def test_of_a_store(cli: Cli, url: str) -> None:
    for words in (["init"], ["artifacts", "gc"]):
        answer = cli("--store", url, *words)
        assert_silent(answer, 2)
        assert answer.err.startswith("error: store: got ")


def test_of_an_endpoint(cli: Cli, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush@127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert_silent(cli("--store", "s3://bucket/prefix", "models", "add", digits), 2)


@pytest.mark.parametrize("url", DATABASES)
def test_in_a_wrong_place(cli: Cli, url: str) -> None:
    for words in ([url], ["--db=", url, "init"], ["jobs", "ls", "--state", url], ["jobs", "ls", f"--database={url}"]):
        assert_silent(cli(*words), 2)


@pytest.mark.postgres
def test_of_a_database_that_works(cli: Cli, empty_postgres_url: str, with_digits: Any) -> None:
    """What succeeds is shown too: where things are, and what to type next."""
    location = parse_url(empty_postgres_url).set(password="hush@quiet/")
    url = location.render_as_string(hide_password=False)
    words = ["--db", url]
    made = cli(*words, "init", "--json")
    assert_silent(made, 0)
    assert made.json["database"].startswith("postgresql+psycopg://postgres:***@")
    drained = cli(*words, "serve", "--drain", "--json")
    assert_silent(drained, 0)
    assert "serving postgresql+psycopg://" in drained.err
    for name in ("thing", "other"):
        answer = cli(*words, "models", "ls")
        assert_silent(answer, 0)
        assert_silent(cli(*words, "models", "show", name), 102)


@pytest.mark.parametrize(
    "host", ["nosuchhost.invalid", "a" * 300, "no such", "..", "127.0.0.1:1", "%2Fno%2Fsocket", "[::1]:1"]
)
def test_a_host_that_does_not_answer_is_bad_input(cli: Cli, host: str) -> None:
    answer = cli("--db", f"postgresql://user:hush@{host}/qm", "init")
    assert_silent(answer, 2)
    assert "Traceback" not in answer.err
