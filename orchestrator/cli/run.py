"""`quantmill run`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import click

from orchestrator.actions.execution import run_job
from orchestrator.actions.jobs import exit_code, show_job
from orchestrator.actions.lora import Lora
from orchestrator.actions.releases import check_target, pull_release
from orchestrator.actions.repair import remake
from orchestrator.actions.signing import read_signing_key, sign_release
from orchestrator.actions.submission import Request, submit
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.jobs import job_text
from orchestrator.cli.keys import sign_option
from orchestrator.cli.submit import notify_queued, request_options
from orchestrator.db.jobs import find_job
from orchestrator.db.rows import JobRow
from orchestrator.logs import log_format, log_to_stderr
from orchestrator.report.write import write_report
from orchestrator.scheduling.scheduler import stop_on_signals
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState
from workers.errors import BlobLostError
from workers.storage.model_folder import SampleSize
from workers.storage.signature import SigningKey


@click.command(cls=Command)
@request_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="New folder to write the release into at the end."
)
@sign_option
@pass_app
def run(
    app: App,
    recipe: str,
    model: str,
    overrides: tuple[str, ...],
    sample_size: SampleSize | None,
    name: str | None,
    device: str | None,
    gpu_type: str | None,
    prompts: Path | None,
    size: tuple[int, int] | None,
    loras: tuple[Lora, ...],
    out: Path | None,
    key_file: Path | None,
) -> int:
    """Queue a job and execute it here, with progress. RECIPE is a YAML file or a name of `recipes ls`.

    Ctrl-C stops at once and loses at most the tasks in flight; the job stays queued, `quantmill serve --drain` or
    the same `quantmill run` again goes on with it (exit code 101). A job of the same model, recipe and release name
    that has not ended is gone on with, whoever queued it.
    """
    if out is not None:
        check_target(out)
    key = read_signing_key(key_file) if key_file is not None else None
    log_to_stderr(log_format(os.environ))
    with app.service() as service, stop_on_signals() as stop:
        request = Request(
            recipe,
            model,
            overrides,
            name,
            0,
            sample_size,
            device,
            gpu_type,
            here=True,
            prompts=prompts,
            loras=loras,
            size=size,
        )
        submitted = submit(service, request, notify=app.notify)
        notify_queued(app, submitted)
        job, written = _run(app, service, submitted.job, out, stop, key)
        view, code = show_job(service, job.id) | written, exit_code(service, job)
        if job.state in ACTIVE_JOBS:
            app.notify(f"job {job.id} is not finished; go on with: {app.command('serve', '--drain')}")
    app.answer(view, lambda: _text(app, view))
    return code


def _run(
    app: App, service: Service, job: JobRow, out: Path | None, stop: threading.Event, key: SigningKey | None
) -> tuple[JobRow, dict[str, Any]]:
    """Execute a job; return it and what was written. Results whose bytes turn out to be lost are made again, once."""
    job = run_job(service, job, stop)
    if job.state is not JobState.SUCCEEDED:
        return job, {}
    try:
        return job, _write(service, job.id, out, key)
    except BlobLostError as error:
        again = remake(service, job.id, [error.digest])
        if again is None:
            raise
        app.notify(f"job {job.id}: {error}")
        app.notify(f"job {again} makes it again")
    with service.database.session(read_only=True) as session:
        job = find_job(session, again)
    job = run_job(service, job, stop)
    return job, _write(service, job.id, out, key) if job.state is JobState.SUCCEEDED else {}


def _write(service: Service, job: str, out: Path | None, key: SigningKey | None) -> dict[str, Any]:
    """Sign the release, and write the report and the release, if asked to; return where they are."""
    if key is not None:
        sign_release(service, show_job(service, job)["release"], key)
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
