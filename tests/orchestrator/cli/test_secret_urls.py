"""Whatever a URL looks like and wherever it stands, no part of its password is shown."""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.cli.app import make_app
from orchestrator.cli.main import run_cli
from orchestrator.db.engine import parse_url
from orchestrator.db.session import open_database
from orchestrator.logs import _Lines
from orchestrator.settings import resolve_settings
from quant_spec.errors import InvalidInputError
from workers.errors import describe
from workers.urls import SecretUrl, hide_passwords, known_secrets, shown_url

# Passwords are made of these, joined by what separates the parts of URLs, texts and mappings.
PARTS = re.compile("(?i)hush|quiet")
WORDS = st.sampled_from(["hush", "quiet", "Hush1", "quietly"])
JOINTS = st.sampled_from([*"@:/?#&=%+ ;,'\"[]{}()\\<>|^`~!$*.-_", "%40", "://", "\u00e9", "\t"])
PASSWORDS = st.builds(
    lambda first, rest: first + "".join(joint + word for joint, word in rest),
    WORDS,
    st.lists(st.tuples(JOINTS, WORDS), max_size=3),
)
QUOTED = PASSWORDS.map(lambda text: quote(text, safe=""))
ANY = st.one_of(PASSWORDS, QUOTED)

#: Ways to write where a database is, `{}` being the password, quoted or not.
URL_FORMS = [
    "postgresql://user:{}@127.0.0.1:1/qm",
    "postgresql+psycopg://user:{}@[::1]:1/qm?sslmode=disable",
    "POSTGRESQL://user:{}@127.0.0.1:1/qm",
    "postgres://:{}@127.0.0.1:1/qm",
    "postgresql://user:{}@127.0.0.1:port/qm",
    "postgresql:///user:{}@127.0.0.1:1/qm",
    "mysql://user:{}@127.0.0.1:1/qm",
    "sqlite://user:{}@127.0.0.1/qm.db",
    "s3://KEY:{}@bucket/prefix",
    "http://user:{}@127.0.0.1:1/path",
]
#: The same, where only a quoted password is one value.
QUERY_FORMS = [
    "postgresql://127.0.0.1:1/qm?user=me&password={}",
    "postgresql://127.0.0.1:1/qm?password={}&sslmode=disable",
    "postgresql://127.0.0.1:1/qm?sslmode=disable&sslpassword={}",
    "postgresql://127.0.0.1:1/qm?passfile={}",
    "sqlite:////nowhere/qm.db?key={}",
    "s3://bucket/prefix?aws_secret_access_key={}",
    "http://127.0.0.1:1/bucket?X-Amz-Signature={}",
]
#: What is no URL at all, but was meant as one.
BROKEN_FORMS = [
    "postgresql:/user:{}@127.0.0.1:1/qm",
    "postgresql//user:{}@127.0.0.1:1/qm",
    " postgresql://user:{}@127.0.0.1:1/qm",
    "user:{}@127.0.0.1:1/qm",
    "//user:{}@127.0.0.1:1/qm",
    "host=127.0.0.1 port=1 user=me password={}",
    "postgresql:/127.0.0.1:1/qm?password={}",
    "127.0.0.1:1/qm?sslpassword={}",
]

URLS = st.one_of(
    st.builds(str.format, st.sampled_from(URL_FORMS + BROKEN_FORMS[:5]), ANY),
    st.builds(str.format, st.sampled_from(QUERY_FORMS + BROKEN_FORMS[5:]), QUOTED),
)
GOOD_URLS = st.builds(str.format, st.sampled_from(URL_FORMS + QUERY_FORMS), QUOTED)


def assert_silent(*texts: object) -> None:
    """Check that nothing of a password stands in any of these."""
    for text in texts:
        assert not PARTS.search(str(text)), text


@given(URLS)
def test_it_is_shown_without(url: str) -> None:
    secret = SecretUrl(url)
    assert_silent(
        shown_url(url), secret, repr(secret), f"{secret}", f"{secret!r:>80}", f"{secret!s}", [secret], {1: secret}
    )
    assert secret.reveal() == url
    with pytest.raises(TypeError):
        json.dumps({"url": secret})


@given(URLS)
def test_what_holds_it_shows_it_without(url: str) -> None:
    try:
        found = resolve_settings({"QUANTMILL_DB": url}, store_url=url)
        app = make_app(None, url, url, None)
    except InvalidInputError as error:
        assert_silent(error)
    else:
        assert_silent(repr(found), repr(app), app.options)


@given(URLS)
def test_reading_it_as_a_database_fails_or_not_without(url: str) -> None:
    try:
        database = open_database(SecretUrl(url))
    except InvalidInputError as error:
        assert_silent(error, repr(error), describe(error))
        # What caused it stays in a traceback.
        assert_silent(repr(error.__cause__))
    else:
        assert_silent(database, repr(database), database.shown_url)
        database.close()


TEXTS = ["{}", "got {}, wanted another", "at '{}': no answer", 'url="{}"', "({})", "two\nlines: {}\nend"]


@given(GOOD_URLS, st.sampled_from(TEXTS))
def test_in_a_text_it_is_hidden(url: str, text: str) -> None:
    message = text.format(url)
    record = logging.LogRecord("orchestrator", logging.WARNING, "", 0, "%s", (message,), None)
    assert_silent(hide_passwords(message), describe(RuntimeError(message)), _Lines().format(record))


NAMES = st.sampled_from(["PGPASSWORD", "sslpassword", "AWS_SECRET_ACCESS_KEY", "my_api_key", "RAY_AUTH_TOKEN"])


@given(PASSWORDS.filter(lambda text: not set(text) & set("\t ,;&'\"\\)}]")), NAMES)
def test_in_a_dump_of_variables_it_is_hidden(password: str, name: str) -> None:
    mapping = {"A": "1", name: password}
    for text in (f"{name}={password}", f"A=1 {name}='{password}' B=2", str(mapping), json.dumps(mapping)):
        assert_silent(hide_passwords(text))


@given(GOOD_URLS, st.sampled_from(["AWS_SECRET_ACCESS_KEY", "PGPASSWORD"]), PASSWORDS)
def test_secrets_of_the_environment_are_known(url: str, name: str, password: str) -> None:
    """A library may quote them alone, in any way."""
    found = known_secrets({name: password, "QUANTMILL_DB": url})
    assert password in found
    assert_silent(hide_passwords(f"no {password} there", found))


@settings(max_examples=40, deadline=None)
@given(URLS, st.sampled_from([["init"], ["jobs", "ls"], ["serve", "--drain"], ["db", "current"], []]))
@example("postgresql:/user:hush\thush@127.0.0.1:1/qm", [])  # which click quotes, the tab as two characters
@example("user:hush\\quiet'hush@127.0.0.1:1/qm", [])
def test_from_the_command_line(url: str, words: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(out), redirect_stderr(err):
        arguments = ["--home", str(Path(folder) / "home"), "--db", url, *words] if words else [url]
        assert run_cli(arguments) in (1, 2)
    assert_silent(out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def a_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that is there, for all examples."""
    home = tmp_path_factory.mktemp("urls") / "home"
    with redirect_stdout(io.StringIO()):
        assert run_cli(["--home", str(home), "init"]) == 0
    return home


STORES = st.one_of(
    st.builds(str.format, st.sampled_from(["s3://KEY:{}@bucket/p", "ftp://user:{}@host/x", "user:{}@host/x"]), ANY),
    st.builds(str.format, st.sampled_from(["ftp://host/x?secret={}", "https://host/x?token={}"]), QUOTED),
)


@settings(max_examples=25, deadline=None)
@given(STORES)
def test_of_a_store_from_the_command_line(a_home: Path, url: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert run_cli(["--home", str(a_home), "--store", url, "artifacts", "gc"]) == 2
    assert_silent(out.getvalue(), err.getvalue())


def test_a_plain_url_stays_as_it_is() -> None:
    """Hiding everything would be no art."""
    for url in ("postgresql://me@host:5432/name", "s3://bucket/prefix", "/a/folder", "sqlite:////a/b.db", "some=thing"):
        assert str(SecretUrl(url)) == url
    assert parse_url(SecretUrl("postgresql://me:hush@host/name")).password == "hush"
    assert hide_passwords("weights.bits=4, tokens: 5, key=value") == "weights.bits=4, tokens: 5, key=value"
