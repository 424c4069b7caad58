"""Databases for schedules: each a copy of one that has the schema and is watched."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from orchestrator.db.session import upgrade
from tests.faults.recorder import install

_TEMPLATE = "faults_template"


class Databases:
    """Makes databases of one kind."""

    def __init__(self, folder: Path, postgres: str | None) -> None:
        """Make the one that is copied: a file in `folder`, or a database of the server whose URL is given."""
        self._postgres = postgres
        self._folder = folder
        self._numbers = itertools.count()
        if postgres is None:
            self._file = folder / "template.db"
            upgrade(f"sqlite:///{self._file}")
            install(f"sqlite:///{self._file}")
            return
        with psycopg.connect(postgres, autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_TEMPLATE,)).fetchone():
                return
            connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        upgrade(with_database(postgres, _TEMPLATE))
        install(with_database(postgres, _TEMPLATE))

    @contextmanager
    def one(self) -> Iterator[str]:
        """Give the URL of a new one, which is removed in the end."""
        name = f"faults_{os.getpid()}_{next(self._numbers)}"
        if self._postgres is None:
            path = self._folder / f"{name}.db"
            shutil.copyfile(self._file, path)
            yield f"sqlite:///{path}"
            for each in self._folder.glob(f"{name}.db*"):
                each.unlink()
            return
        # A connection for each, as the server may be restarted in between.
        self._execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        yield with_database(self._postgres, name)
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        assert self._postgres is not None
        with psycopg.connect(self._postgres, autocommit=True) as connection:
            connection.execute(statement.encode())


def with_database(url: str, name: str) -> str:
    """Name another database of the same server; the URL's query says where its socket is."""
    server, question, query = url.partition("?")
    return f"{server.rsplit('/', 1)[0]}/{name}{question}{query}"
