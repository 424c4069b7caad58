"""URLs as people may see them: without passwords, whatever the URL looks like.

A password that was not quoted (an `@`, `/` or `?` in it) makes a URL ambiguous: part of the password looks like a host
or a path. So a URL is shown in parts only where it can be read in one way, and otherwise as its scheme alone.
"""

from __future__ import annotations

import re

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
#: Parameters of a database URL that hold no secret.
HARMLESS_PARAMETERS = {
    "application_name", "connect_timeout", "dbname", "host", "hostaddr", "port", "sslmode", "target_session_attrs",
    "user",
}  # fmt: skip
# A word that begins as a URL, without the punctuation of the sentence around it; and what of its line may belong to it.
_WORD = r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*?(?=[:,.;)]*(?:[\s'\"]|$))"
_IN_TEXT = re.compile(rf"(?P<word>{_WORD})(?P<more>(?:(?!://)[^\n])*@[^\s'\"]*)?", re.MULTILINE)


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
        is_path = url.startswith("/") and not url.startswith("//")
        return HIDDEN if "@" in url and (":" in url or "//" in url) and not is_path else url
    scheme, rest = match["scheme"], match["rest"]
    # A file has no password, and its path may hold any character.
    if scheme in ("file", "sqlite") and rest.startswith("/"):
        return url
    if scheme == "s3" and _BUCKET.fullmatch(rest):
        return url
    plain = _PLAIN.fullmatch(rest)
    if plain is None:
        return f"{scheme}://{HIDDEN}"
    user = "" if plain["user"] is None else f"{plain['user']}{':' + HIDDEN if plain['password'] else ''}@"
    query = "" if plain["query"] is None else f"?{_shown_query(plain['query'])}"
    return f"{scheme}://{user}{plain['host']}{plain['port'] or ''}{plain['path'] or ''}{query}"


def _shown_query(query: str) -> str:
    """Return parameters if none may hold a secret; else nothing, as what an unquoted `&` splits may be part of it."""
    harmless = all(item.partition("=")[0] in HARMLESS_PARAMETERS for item in query.split("&"))
    return query if harmless else HIDDEN


def hide_passwords(text: str) -> str:
    """Return a text for people in which every URL is as `shown_url` gives it.

    A URL that can be read in several ways takes with it what follows, up to the line's last `@`: an unquoted password
    may hold spaces.
    """
    return _IN_TEXT.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    word, more = match["word"], match["more"] or ""
    shown = shown_url(word)
    return shown if shown.endswith(f"://{HIDDEN}") else shown + hide_passwords(more)
