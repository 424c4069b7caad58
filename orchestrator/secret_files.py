"""Secrets from files, as Docker and Kubernetes hand them out: a variable's name with `_FILE` names the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from quant_spec.errors import InvalidInputError

DATABASE = "QUANTMILL_DB"
DATABASE_FILE = "QUANTMILL_DB_FILE"
PASSWORD_FILE = "QUANTMILL_DB_PASSWORD_FILE"
#: More bytes than any URL or password has.
_LONGEST = 16 << 10


def database_url_of(environ: Mapping[str, str], given: str | None) -> str | None:
    """Return the database's URL from the command line, a variable or files; None if none of them names one.

    Parameters
    ----------
    environ
        Read for `QUANTMILL_DB`, or a file with it in `QUANTMILL_DB_FILE`, and for a file with the password alone in
        `QUANTMILL_DB_PASSWORD_FILE`, which goes into a URL that has a user and no password. An empty value counts as
        absent.
    given
        What the command line gave; it wins over variable and file.

    Raises
    ------
    InvalidInputError
        If both the variable and its file are set, a file cannot be read or is empty, or the URL names no user for the
        password. No message holds what a file holds.
    """
    variable, file = environ.get(DATABASE), environ.get(DATABASE_FILE)
    if variable and file:
        raise InvalidInputError(f"{DATABASE}: got it and {DATABASE_FILE}, wanted one of them")
    url = given or variable or (read_secret(DATABASE_FILE, file) if file else None)
    password = environ.get(PASSWORD_FILE)
    if not url or not password:
        return url or None
    return _with_password(url, read_secret(PASSWORD_FILE, password))


def read_secret(variable: str, file: str) -> str:
    """Return the text of a file without the line end that editors and `echo` put behind it.

    Raises
    ------
    InvalidInputError
        If it cannot be read, is empty, or is no text.
    """
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(_LONGEST).decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "bytes that are no text"
        raise InvalidInputError(f"{variable}: got {file}: {reason}, wanted a file to read") from None
    if not text:
        raise InvalidInputError(f"{variable}: got {file}, which is empty, wanted a secret in it")
    return text


def _with_password(url: str, password: str) -> str:
    """Put a password into a Postgres URL that has a user but no password."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.startswith("sqlite"):
        return url
    user, at, host = rest.partition("@")
    if ":" in user and at:
        return url
    if not at or not user or "/" in user or "?" in user:
        raise InvalidInputError(
            f"{PASSWORD_FILE}: got a database URL without a user, wanted postgresql://user@host/name"
        )
    return f"{scheme}://{user}:{quote(password, safe='')}@{host}"
