"""`quantmill serve`."""

from __future__ import annotations

import click

from orchestrator.actions.execution import serve as serve_jobs
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.home import shown_url
from orchestrator.logs import log_to_stderr
from orchestrator.scheduling.scheduler import stop_on_signals


@click.command(cls=Command)
@click.option("--drain", is_flag=True, help="Exit when no job is left to execute.")
@pass_app
def serve(app: App, drain: bool) -> None:
    """Execute queued jobs on Ray. Any number may run on one database, on any machines.

    Ctrl-C or SIGTERM gives the tasks in flight back, and exits.
    """
    log_to_stderr()
    with app.service() as service, stop_on_signals() as stop:
        app.notify(f"serving {shown_url(app.settings.database_url)}, store {app.settings.store_url}")
        serve_jobs(service, stop, drain=drain)
        drained = not stop.is_set()
    app.answer({"drained": drained}, str)
