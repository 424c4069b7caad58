"""`quantmill init` and `quantmill db`."""

from __future__ import annotations

import click

from orchestrator.cli.app import App, Command, Group, pass_app
from orchestrator.db.session import SchemaState, current, upgrade
from orchestrator.service import initialise


@click.command(cls=Command)
@click.option(
    "--adopt",
    is_flag=True,
    help="Let the store belong to this database from now on, whoever had it: what this database does not know, "
    "`artifacts gc` then removes.",
)
@pass_app
def init(app: App, adopt: bool) -> None:
    """Create the home, the database's schema and the store. Doing it again changes nothing.

    The store gets a file quantmill.json that says which database it belongs to; one that is empty, or holds what this
    database knows, belongs to this one.
    """
    state, owner = initialise(app.settings, adopt=adopt)
    document = {
        "home": str(app.settings.home),
        "database": str(app.settings.database_url),
        "store": str(app.settings.store),
        "schema": state.revision,
        "store_of": owner.value,
    }
    app.answer(document, lambda: "\n".join(f"{name:<9} {value}" for name, value in document.items()))


@click.group(cls=Group)
def db() -> None:
    """Look at or upgrade the database's schema."""


@db.command("current")
@pass_app
def db_current(app: App) -> None:
    """Show which schema the database has, and which one this Quantmill works with."""
    _show(app, current(app.settings.database_url))


@db.command("upgrade")
@pass_app
def db_upgrade(app: App) -> None:
    """Bring the database to this Quantmill's schema. Stop every `quantmill serve` of an older version first."""
    _show(app, upgrade(app.settings.database_url))


def _show(app: App, state: SchemaState) -> None:
    document = {"revision": state.revision, "head": state.head, "current": state.revision == state.head}
    app.answer(document, lambda: f"schema {state.revision or 'none'}, wanted {state.head}")
