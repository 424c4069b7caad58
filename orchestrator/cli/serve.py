"""`quantmill serve`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.actions.execution import serve as serve_jobs
from orchestrator.actions.jobs import NOT_FINISHED
from orchestrator.actions.signing import read_signing_key, signing
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.keys import sign_option
from orchestrator.logs import log_to_stderr
from orchestrator.scheduling.scheduler import Served, stop_on_signals


@click.command(cls=Command)
@click.option("--drain", is_flag=True, help="Exit when no job is left to execute.")
@sign_option
@pass_app
def serve(app: App, drain: bool, key_file: Path | None) -> int:
    """Execute queued jobs on Ray. Any number may run on one database, on any machines.

    Ctrl-C or SIGTERM gives the tasks in flight back, and exits: with code 101 if --drain was to empty the queue.
    The last line on stderr says why it ended and how many tasks it executed.
    """
    log_to_stderr()
    key = read_signing_key(key_file) if key_file is not None else None
    with app.service() as service, signing(service, key), stop_on_signals() as stop:
        app.notify(f"serving {app.settings.database_url}, store {app.settings.store}")
        served = serve_jobs(service, stop, drain=drain)
    app.notify(_ending(served))
    app.answer({"drained": not served.stopped, "executed": served.executed}, str)
    return NOT_FINISHED if drain and served.stopped else 0


def _ending(served: Served) -> str:
    """Say why a scheduler ended; never nothing, as one that did nothing would be taken for one that did all."""
    if served.stopped:
        return f"stopped by a signal: {served.executed} tasks executed here, unfinished jobs stay queued"
    if not served.found_work:
        return "nothing queued: no job to execute"
    return f"drained: {served.executed} tasks executed here, no job is left"
