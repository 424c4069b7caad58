"""URLs as people may see them: without passwords, whatever the URL looks like.

A password that was not quoted (an `@`, `/` or `?` in it) makes a URL ambiguous: part of the password looks like a host
or a path. So a URL is shown in parts only where it can be read in one way, and otherwise as its scheme alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

HIDDEN = "***"

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# What comes after the scheme, where each character stands for one thing only.
_PLAIN = re.compile(
    r"""
    (?:(?P<user>[^:/?\#@\s]*)(?P<password>:[^/?\#@\s]*)?@)?
    (?P<host>\[[0-9A-Fa-f:.]+\]|[\w.,%-]*)
    (?P<port>:[0-9]*)?
    (?P<path>/[^?\#@:\s]*)?
    (?:\?(?P<query>[^\#@\s]*))?
    """,
    re.VERBOSE,
)
_BUCKET = re.compile(r"[A-Za-z0-9._-]+(?:/.*)?", re.DOTALL)
# What gives a secret away where there is no URL around it: `password=...`, as in a connection string of libpq or an
# environment, and `"password": "..."`, as in a mapping that was printed.
_NAMED = r"[\w.-]{0,40}(?:passw|passphrase|pwd|secret|credential|token|access_?key|api_?key|signature)[\w.-]{0,40}"
_ASSIGNED = re.compile(
    rf"(?i)(?P<name>{_NAMED}\s*=\s*)(?P<value>'(?:\\.|[^'\\])*'?|\"(?:\\.|[^\"\\])*\"?|[^\s'\",;&)}}\]]+)"
)
_ENTRY = re.compile(rf"(?i)(?P<name>(?P<quote>['\"]){_NAMED}(?P=quote)\s*:\s*)(?P<value>'[^']*'?|\"[^\"]*\"?)")
#: Variables that hold a secret as they are, and those that hold a URL with one.
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "RAY_AUTH_TOKEN", "HF_TOKEN")
_URL_VARIABLES = ("QUANTMILL_DB", "QUANTMILL_STORE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
# A shorter one is in any text.
_SHORTEST_SECRET = 4
#: Parameters of a database URL that hold no secret.
HARMLESS_PARAMETERS = {
    "application_name", "connect_timeout", "dbname", "host", "hostaddr", "port", "sslmode", "target_session_attrs",
    "user",
}  # fmt: skip
# A word that begins as a URL, without the punctuation of the sentence around it; and what of its line may belong to it.
_WORD = r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*?(?=[:,.;)]*(?:[\s'\"]|$))"
_IN_TEXT = re.compile(rf"(?P<word>{_WORD})(?P<more>(?:(?!://)[^\n])*@[^\s'\"]*)?", re.MULTILINE)


@dataclass(frozen=True, slots=True, repr=False)
class SecretUrl:
    """A URL, or a path, that may hold a password: whatever shows it, shows it without. `reveal` is for connecting.

    It is no text, so that it cannot be joined, encoded or logged as one by mistake.
    """

    _url: str

    def reveal(self) -> str:
        """Return the URL as it was given, for whoever connects."""
        return self._url

    def __str__(self) -> str:
        return shown_url(self._url)

    def __repr__(self) -> str:
        return f"SecretUrl({shown_url(self._url)!r})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def reveal(url: SecretUrl | str) -> str:
    """Return a URL as text, for whoever connects; a text stays as it is."""
    return url.reveal() if isinstance(url, SecretUrl) else url


def is_plain_url(url: str) -> bool:
    """Say whether a URL can be read in one way only: what separates its parts occurs in none of them."""
    match = _SCHEME.fullmatch(url)
    return match is not None and _PLAIN.fullmatch(match["rest"]) is not None


def shown_url(url: str) -> str:
    """Return a URL of a database or store, or a folder's path, without its password.

    Returns
    -------
    str
        The same but for the password, parameters among which one may be a secret, and all after the scheme of a URL
        that can be read in several ways. A path stays as it is.
    """
    match = _SCHEME.fullmatch(url)
    if match is None:
        # `postgresql:/me:secret@host`, `me:secret@host` and `//me:secret@host` are no paths.
        is_path = url.startswith(("/", "./", "../", "~/")) and not url.startswith("//")
        is_login = "@" in url and (":" in url or "//" in url)
        # `password=secret`, as libpq takes it, and the query of a URL whose scheme was left out or misspelt.
        is_query = "://" in url or re.search(r"\?.*=", url, re.DOTALL) or _ASSIGNED.search(url)
        return HIDDEN if (is_login or is_query) and not is_path else url
    scheme, rest = match["scheme"], match["rest"]
    # A file has no password, and its path may hold any character.
    if scheme in ("file", "sqlite") and rest.startswith("/"):
        return _without_query(url)
    if scheme == "s3" and _BUCKET.fullmatch(rest):
        return _without_query(url)
    plain = _PLAIN.fullmatch(rest)
    if plain is None:
        return f"{scheme}://{HIDDEN}"
    user = "" if plain["user"] is None else f"{plain['user']}{':' + HIDDEN if plain['password'] else ''}@"
    query = "" if plain["query"] is None else f"?{_shown_query(plain['query'])}"
    return f"{scheme}://{user}{plain['host']}{plain['port'] or ''}{plain['path'] or ''}{query}"


def _without_query(path: str) -> str:
    """Return a path without what can be parameters, as `x.db?key=secret`: they mean nothing here, but may be meant."""
    found = re.search(r"\?[^?=/]*=", path)
    return path if found is None else f"{path[: found.start()]}?{HIDDEN}"


def _shown_query(query: str) -> str:
    """Return parameters if none may hold a secret; else nothing, as what an unquoted `&` splits may be part of it."""
    harmless = all(item.partition("=")[0] in HARMLESS_PARAMETERS for item in query.split("&"))
    return query if harmless else HIDDEN


def hide_passwords(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text for people in which every URL is as `shown_url` gives it.

    A URL that can be read in several ways takes with it what follows, up to the line's last `@`: an unquoted password
    may hold spaces. What is assigned to a name such as `password` is hidden, too, and all of `secrets`.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_TEXT.sub(_hide, text)
    return _ENTRY.sub(rf"\g<name>'{HIDDEN}'", _ASSIGNED.sub(rf"\g<name>{HIDDEN}", text))


def known_secrets(environ: Mapping[str, str], urls: Iterable[str] = ()) -> set[str]:
    """Return what may not be shown of an environment's variables and of URLs, as it stands there and unquoted."""
    found = {environ.get(name, "") for name in _SECRET_VARIABLES}
    for url in (*(environ.get(name, "") for name in _URL_VARIABLES), *urls):
        match = _SCHEME.fullmatch(url.strip())
        plain = None if match is None else _PLAIN.fullmatch(match["rest"])
        if plain is None:
            continue
        parts = [(plain["password"] or ":")[1:]]
        for item in (plain["query"] or "").split("&"):
            name, _, value = item.partition("=")
            parts += [value] if name not in HARMLESS_PARAMETERS else []
        found |= {form for part in parts for form in (part, unquote(part))}
    return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}


def _hide(match: re.Match[str]) -> str:
    word, more = match["word"], match["more"] or ""
    shown = shown_url(word)
    return shown if shown.endswith(f"://{HIDDEN}") else shown + hide_passwords(more)
