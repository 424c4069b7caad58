"""`quantmill serve`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from orchestrator.actions.execution import serve as serve_jobs
from orchestrator.actions.jobs import NOT_FINISHED
from orchestrator.actions.signing import read_signing_key, signing
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.keys import sign_option
from orchestrator.logs import FORMAT_VARIABLE, LogFormat, log_format, log_to_stderr
from orchestrator.scheduling.scheduler import Served, stop_on_signals
from orchestrator.scheduling.watch import Watch
from orchestrator.service import Service

log = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"


@click.command(cls=Command)
@click.option("--drain", is_flag=True, help="Exit when no job is left to execute.")
@click.option(
    "--metrics",
    "port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Serve /metrics for Prometheus, /healthz and /readyz there; 0: any free port.",
)
@click.option("--metrics-host", "host", metavar="HOST", help=f"Where --metrics listens.  [default: {_LOOPBACK}]")
@click.option(
    "--log-format",
    "style",
    type=click.Choice([each.value for each in LogFormat]),
    help=f"How lines on stderr are written. json: also what starts and ends.  [{FORMAT_VARIABLE}, text]",
)
@sign_option
@pass_app
def serve(app: App, drain: bool, port: int | None, host: str | None, style: str | None, key_file: Path | None) -> int:
    """Execute queued jobs on Ray. Any number may run on one database, on any machines.

    Ctrl-C or SIGTERM gives the tasks in flight back, and exits: with code 101 if --drain was to empty the queue.
    The last line on stderr says why it ended and how many tasks it executed.
    """
    if host is not None and port is None:
        raise click.UsageError("--metrics-host: got it without --metrics, wanted both")
    chosen = log_format(os.environ, style)
    log_to_stderr(chosen)
    say: Callable[[str], None] = log.info if chosen is LogFormat.JSON else app.notify
    key = read_signing_key(key_file) if key_file is not None else None
    with app.service() as service, signing(service, key), stop_on_signals() as stop:
        say(f"serving {app.settings.database_url}, store {app.settings.store}")
        with _watched(service, host or _LOOPBACK, port, say) as watch:
            served = serve_jobs(service, stop, drain=drain, watch=watch)
    say(_ending(served))
    app.answer({"drained": not served.stopped, "executed": served.executed}, str)
    return NOT_FINISHED if drain and served.stopped else 0


@contextmanager
def _watched(service: Service, host: str, port: int | None, say: Callable[[str], None]) -> Iterator[Watch]:
    """Serve metrics if asked to; yield what the scheduler tells what it does."""
    if port is None:
        yield Watch()
        return
    # Imported here: commands that serve no metrics need no client of Prometheus.
    from orchestrator.monitoring.server import monitoring
    from orchestrator.scheduling.scheduler import owner_name

    with monitoring(service.database, service.store, host, port, owner_name()) as (watch, address):
        say(f"metrics on {address}")
        yield watch


def _ending(served: Served) -> str:
    """Say why a scheduler ended; never nothing, as one that did nothing would be taken for one that did all."""
    if served.stopped:
        return f"stopped by a signal: {served.executed} tasks executed here, unfinished jobs stay queued"
    if not served.found_work:
        return "nothing queued: no job to execute"
    return f"drained: {served.executed} tasks executed here, no job is left"
