"""Who may use a Ray: whoever has its token runs code on its nodes, so the token is as good as a login there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

#: What tasks have no use for, and a worker that prints its environment would show.
_NOT_FOR_WORKERS = ("QUANTMILL_DB", "QUANTMILL_SIGN_PASSWORD", "PGPASSWORD", "PGPASSFILE")


def local_environment() -> dict[str, str]:
    """Return the variables of a local Ray: a token of its own, made anew, that no file holds.

    Its ports are on the loopback address, which every user of the machine reaches.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what tasks have no use for: the database's URL and password, a key's password."""
    return {name: value for name, value in environ.items() if name not in _NOT_FOR_WORKERS}


def token_file(environ: Mapping[str, str]) -> Path | None:
    """Return the file that Ray reads its token from, if it is there and no variable holds the token."""
    if environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path if path.is_file() else None


def session_folder(private: Path) -> Path:
    """Return the folder for Ray's files in one that only its owner may enter: Ray opens its own to everybody."""
    folder = private / "r"
    os.mkdir(folder, 0o700)
    return folder
