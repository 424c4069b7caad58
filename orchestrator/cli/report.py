"""`quantmill report`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.cli.app import App, Command, pass_app
from orchestrator.report.write import write_report


@click.command(cls=Command)
@click.argument("job")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.html", help="By default in HOME/reports."
)
@pass_app
def report(app: App, job: str, out: Path | None) -> None:
    """Write the report of a finished job: one HTML file that needs nothing else."""
    with app.service() as service:
        path = write_report(service, job, out)
    app.answer({"report": str(path)}, lambda: str(path))
