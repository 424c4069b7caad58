"""Secrets from files: what a container is handed becomes the database's URL, and is never shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from orchestrator.secret_files import database_url_of
from quant_spec.errors import InvalidInputError

Cli = Callable[..., Any]


def test_a_file_holds_the_whole_url_or_the_password(tmp_path: Path) -> None:
    whole, password = tmp_path / "url", tmp_path / "password"
    whole.write_text("postgresql://me:a@one/db\n")
    password.write_text("p@:/?#% ü\n")
    assert database_url_of({"QUANTMILL_DB_FILE": str(whole)}, None) == "postgresql://me:a@one/db"
    environ = {"QUANTMILL_DB": "postgresql://me@two:5/db?sslmode=require", "QUANTMILL_DB_PASSWORD_FILE": str(password)}
    url = database_url_of(environ, None)
    assert url is not None
    assert make_url(url).password == "p@:/?#% ü"
    assert url.endswith("@two:5/db?sslmode=require")
    # The option wins; a password that is given stays; files and SQLite have none.
    assert database_url_of(environ, "postgresql://me:mine@three/db") == "postgresql://me:mine@three/db"
    assert database_url_of(environ, "sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"
    assert database_url_of({"QUANTMILL_DB_PASSWORD_FILE": str(password)}, None) is None
    assert database_url_of({"QUANTMILL_DB": "", "QUANTMILL_DB_FILE": ""}, None) is None


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1))
def test_any_password_reaches_the_driver_as_it_is(tmp_path_factory: pytest.TempPathFactory, password: str) -> None:
    file = tmp_path_factory.getbasetemp() / "password"
    file.write_text(password, encoding="utf-8")
    url = database_url_of({"QUANTMILL_DB": "postgresql://me@host/db", "QUANTMILL_DB_PASSWORD_FILE": str(file)}, None)
    assert url is not None
    assert make_url(url).password == password


@pytest.mark.parametrize(
    ("environ", "content", "message"),
    [
        (
            {"QUANTMILL_DB_FILE": "<file>"},
            None,
            "QUANTMILL_DB_FILE: got <file>: No such file or directory, wanted a file",
        ),
        ({"QUANTMILL_DB_FILE": "<file>"}, b"\n", "QUANTMILL_DB_FILE: got <file>, which is empty"),
        ({"QUANTMILL_DB_FILE": "<file>"}, b"secret\xff", "QUANTMILL_DB_FILE: got <file>: bytes that are no text"),
        ({"QUANTMILL_DB_FILE": "<file>", "QUANTMILL_DB": "x"}, b"secret", "got it and QUANTMILL_DB_FILE, wanted one"),
        (
            {"QUANTMILL_DB_PASSWORD_FILE": "<file>", "QUANTMILL_DB": "postgresql://host/db"},
            b"secret",
            "got a database URL without a user",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: dict[str, str],
    content: bytes | None,
    message: str,
) -> None:
    file = tmp_path / "secret-file"
    if content is not None:
        file.write_bytes(content)
    for name, value in environ.items():
        monkeypatch.setenv(name, value.replace("<file>", str(file)))
    answer = cli("jobs", "ls")
    assert (answer.code, answer.out) == (2, "")
    assert message.replace("<file>", str(file)) in answer.err
    assert len(answer.err.splitlines()) == 1
    with pytest.raises(InvalidInputError):
        database_url_of({name: value.replace("<file>", str(file)) for name, value in environ.items()}, None)
