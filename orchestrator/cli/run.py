"""`quantmill run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from orchestrator.actions.execution import run_job
from orchestrator.actions.jobs import exit_code, show_job
from orchestrator.actions.releases import check_target, pull_release
from orchestrator.actions.submission import Request, submit
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.jobs import job_text
from orchestrator.cli.submit import request_options, tell_next
from orchestrator.logs import log_format, log_to_stderr
from orchestrator.report.write import write_report
from orchestrator.scheduling.scheduler import stop_on_signals
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState
from workers.storage.model_folder import SampleSize


@click.command(cls=Command)
@request_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="New folder to write the release into at the end."
)
@pass_app
def run(
    app: App,
    recipe: str,
    model: str,
    overrides: tuple[str, ...],
    sample_size: SampleSize | None,
    name: str | None,
    out: Path | None,
) -> int:
    """Queue a job and execute it here, with progress. RECIPE is a YAML file or a name of `recipes ls`.

    Ctrl-C stops at once and loses at most the tasks in flight; the job stays queued, `quantmill serve --drain` or
    the same `quantmill run` again goes on with it (exit code 101).
    """
    if out is not None:
        check_target(out)
    log_to_stderr(log_format(os.environ))
    with app.service() as service, stop_on_signals() as stop:
        submitted = submit(service, Request(recipe, model, overrides, name, sample_size=sample_size), notify=app.notify)
        tell_next(app, submitted)
        job = run_job(service, submitted.job, stop)
        view, code = show_job(service, job.id), exit_code(service, job)
        if job.state in ACTIVE_JOBS:
            app.notify(f"job {job.id} is not finished; go on with: {app.command('serve', '--drain')}")
        elif job.state is JobState.SUCCEEDED:
            view |= _finish(service, job.id, out)
    app.answer(view, lambda: _text(app, view))
    return code


def _finish(service: Service, job: str, out: Path | None) -> dict[str, Any]:
    """Write the report, and the release if asked to; return where they are."""
    written = {"report": str(write_report(service, job)), "folder": None}
    if out is not None:
        ref = show_job(service, job)["release"]
        pull_release(service, ref, out)
        written["folder"] = str(out.absolute())
    return written


def _text(app: App, view: dict[str, Any]) -> str:
    """Return the job, where its report is, and what to type next."""
    lines = [job_text(view)]
    if view.get("report"):
        lines.append(f"{'report':<9} {view['report']}")
    if view.get("folder"):
        lines.append(f"{'folder':<9} {view['folder']}")
    if view["release"]:
        ref = view["release"]
        folder = ref.replace("@", "-")
        lines += [
            "",
            "next:",
            f"  {app.command('artifacts', 'pull', ref, folder)}    # a folder that diffusers loads",
            f"  {app.command('bench', ref)}    # latency, images per second and memory here",
            f"  {app.command('artifacts', 'alias', ref, 'prod')}    # a name that you can move later",
        ]
    return "\n".join(lines)
