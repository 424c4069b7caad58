"""`quantmill jobs`."""

from __future__ import annotations

import json
from typing import Any

import click

from orchestrator.actions.cluster import ran_lines
from orchestrator.actions.jobs import exit_code, job_events, show_job, show_jobs, wait_for_job
from orchestrator.cli.app import App, Group, pass_app
from orchestrator.cli.numbers import FiniteRange
from orchestrator.db.jobs import cancel_job, find_job, retry_job
from orchestrator.scheduling.running import step_text
from orchestrator.states import JobState
from orchestrator.text import human_seconds, printable, table
from quant_spec.metrics import Place, lines
from quant_spec.numbers import human_bytes


@click.group(cls=Group)
def jobs() -> None:
    """Follow, cancel and retry jobs. JOB is an id or a unique beginning of one."""


@jobs.command("ls")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, newest first.")
@pass_app
def jobs_ls(app: App, state: str | None, limit: int) -> None:
    """List jobs, newest first."""
    with app.service(need_store=False) as service:
        views = show_jobs(service, state=JobState(state) if state else None, limit=limit)
    app.answer(views, lambda: _job_table(views))


@jobs.command("show")
@click.argument("job")
@click.option("--tasks", "each", is_flag=True, help="List where each task ran, too.")
@pass_app
def jobs_show(app: App, job: str, each: bool) -> None:
    """Show one job, and on which nodes and devices its tasks ran."""
    with app.service(need_store=False) as service:
        view = show_job(service, job)
    app.answer(view, lambda: job_text(view) + (f"\n\n{_task_table(view)}" if each else ""))


@jobs.command("logs")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@pass_app
def jobs_logs(app: App, job: str, follow: bool) -> None:
    """Show what happened to a job and its tasks, one line each; with --json, one document of all of it."""
    with app.service(need_store=False) as service:
        rows = job_events(service, job, follow=follow)
        if app.json:
            app.answer(list(rows), str)
            return
        for row in rows:
            click.echo(printable(_event_line(row)))


@jobs.command("wait")
@click.argument("job")
@click.option("--timeout", type=FiniteRange(0), metavar="SECONDS", help="Give up after so long, with exit code 101.")
@pass_app
def jobs_wait(app: App, job: str, timeout: float | None) -> int:
    """Wait until a job has ended.

    Exit code: 0 succeeded, 100 failed, 2 failed for bad input, 101 not finished in time, 103 cancelled.
    """
    with app.service(need_store=False) as service:
        row = wait_for_job(service, job, timeout, app.notify)
        view, code = show_job(service, row.id), exit_code(service, row)
    app.answer(view, lambda: job_text(view))
    return code


@jobs.command("cancel")
@click.argument("job")
@pass_app
def jobs_cancel(app: App, job: str) -> None:
    """Cancel a job; tasks that other jobs want go on."""
    with app.service(need_store=False) as service:
        with service.database.session() as session:
            row = find_job(session, job)
            cancel_job(session, row.id)
        view = show_job(service, row.id)
    app.answer(view, lambda: f"job {view['job']} is {view['state']}")


@jobs.command("retry")
@click.argument("job")
@pass_app
def jobs_retry(app: App, job: str) -> None:
    """Queue a failed or cancelled job again; what had finished is kept."""
    with app.service(need_store=False) as service:
        with service.database.session() as session:
            row = find_job(session, job)
            retry_job(session, row.id)
        view = show_job(service, row.id)
    app.answer(view, lambda: f"job {view['job']} is {view['state']}")


def _job_table(views: list[dict[str, Any]]) -> str:
    if not views:
        return "no jobs yet; quantmill run RECIPE --model M makes one"
    rows = [
        (
            view["job"],
            "waiting" if view["waiting"] else view["state"],
            view["model"],
            view["recipe"],
            f"{view['tasks']['succeeded']}/{view['tasks']['total']}",
            human_seconds(view["seconds"]),
            view["release"],
            view["created_at"],
        )
        for view in views
    ]
    return table(("JOB", "STATE", "MODEL", "RECIPE", "TASKS", "TIME", "RELEASE", "CREATED"), rows)


def job_text(view: dict[str, Any]) -> str:
    """Return a job's view for a person."""
    tasks = view["tasks"]
    counts = ", ".join(f"{tasks[name]} {name}" for name in tasks if name != "total" and tasks[name])
    facts = [
        ("job", view["job"]),
        ("state", view["state"]),
        ("waiting", view["waiting"]),
        ("model", view["model"]),
        ("recipe", view["recipe"]),
        ("tasks", f"{tasks['total']}" + (f" ({counts})" if counts else "")),
        *(("now", step_text(step)) for step in view.get("steps", ())),
        ("device", _device(view)),
        *(("ran on", line) for line in ran_lines(view.get("ran", ()))),
        *(("left out", line) for line in view.get("left_out", ())),
        ("time", human_seconds(view["seconds"])),
        ("release", view["release"]),
        ("digest", view["digest"]),
        *metric_lines(view["metrics"] or {}),
        ("error", view["error"]),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in facts if value is not None)


def _device(view: dict[str, Any]) -> str | None:
    """Return what a job says of devices; None if nothing."""
    words = [view["device"]] if view["device"] != "auto" or view["gpu_type"] else []
    return " ".join([*words, *([view["gpu_type"]] if view["gpu_type"] else [])]) or None


def _task_table(view: dict[str, Any]) -> str:
    """Return where each task of a job ran."""
    rows = [
        (
            task["task"][:12],
            task["kind"],
            task["label"],
            "cached" if task["cached"] else task["state"],
            task["node"],
            task["device"],
            None if task["seconds"] is None else human_seconds(task["seconds"]),
            human_bytes(task["peak_gpu_bytes"]) if task["peak_gpu_bytes"] else None,
        )
        for task in view["ran"]
    ]
    return table(("TASK", "KIND", "LABEL", "STATE", "NODE", "DEVICE", "TIME", "GPU MEMORY"), rows)


def metric_lines(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a release's metrics for a person, as (name, value)."""
    return [(label, text) for label, text in lines(Place.JOB, metrics).values()]


def _event_line(view: dict[str, Any]) -> str:
    """Return one event as a line: when, who, what happened, and its data as name=value."""
    who = f"job {view['job']}"
    if view["task"]:
        named = f"({view['label']})" if view["label"] else ""
        who = f"task {view['task'][:12]} {view['kind'] or ''}{named}"
    data = {"attempt": view["attempt"], **view["data"]} if view["attempt"] else view["data"]
    return " ".join([view["at"], who, view["event"], *(f"{name}={_plain(value)}" for name, value in data.items())])


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) and value and " " not in value else json.dumps(value, ensure_ascii=False)
