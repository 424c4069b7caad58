"""`quantmill submit`, and what it shares with `quantmill run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.actions.dry_run import DryRun, dry_run_job
from orchestrator.actions.jobs import exit_code, show_job, wait_for_job
from orchestrator.actions.lora import Lora
from orchestrator.actions.submission import Request, Submitted
from orchestrator.actions.submission import submit as submit_job
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.image_size import image_size_option
from orchestrator.cli.jobs import job_text
from orchestrator.cli.lora import lora_option
from orchestrator.cli.sample_size import sample_size_option
from orchestrator.planning.estimate import DENOISER, PROMPTS
from orchestrator.text import human_seconds, table
from quant_spec.numbers import human_bytes
from workers.storage.model_folder import SampleSize

F = TypeVar("F", bound=Callable[..., Any])

_MODEL_HELP = (
    "Name of models ls, diffusers folder or hf:owner/name[@revision]. A name means the bytes that were registered, a "
    "path those that are there now. Where a registered model and a folder here with other bytes have the same NAME, "
    "./NAME is the folder, and NAME@DIGEST the registered model."
)


def request_options(function: F) -> F:
    """Give a command the options that make up a request."""
    options = (
        click.argument("recipe"),
        click.option("--model", required=True, metavar="M", help=_MODEL_HELP),
        click.option(
            "--set", "overrides", metavar="A.B=V", multiple=True, help="Change a value of the recipe; may be repeated."
        ),
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="What a whole pipeline is told, one line each: text, TSV or JSON lines of prompts or class labels, "
            "and of images or arrays that its call takes. By default 256 neutral prompts, or all classes.",
        ),
        image_size_option,
        lora_option,
        sample_size_option,
        click.option("--name", metavar="RELEASE", help="Name to publish under; MODEL-RECIPE by default."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            help="Where tasks run that gain by a GPU, instead of the recipe's resources.device; auto is on one if "
            "one fits.",
        ),
        click.option(
            "--gpu-type", metavar="TYPE", help="Only on GPUs of this type, as jobs show names them (H100, A100, ...)."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=Command)
@request_options
@click.option("--priority", type=int, default=0, show_default=True, help="Higher goes first.")
@click.option("--wait/--no-wait", default=False, help="Return only when the job has ended, with its exit code.")
@click.option("--dry-run", is_flag=True, help="Queue nothing; say how many tasks, how long, how much memory.")
@pass_app
def submit(
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
    priority: int,
    wait: bool,
    dry_run: bool,
) -> int:
    """Queue a job; `quantmill serve` executes it. RECIPE is a YAML file or a name of `recipes ls`."""
    request = Request(
        recipe, model, overrides, name, priority, sample_size, device, gpu_type, prompts=prompts, loras=loras, size=size
    )
    with app.service() as service:
        if dry_run:
            found = dry_run_job(service, request, notify=app.notify)
            app.answer(found.document(), lambda: dry_run_text(found))
            return 0
        submitted = submit_job(service, request, notify=app.notify)
        notify_queued(app, submitted)
        app.notify(f"  {app.command('serve', '--drain')}    # execute what is queued, if nothing does")
        job = submitted.job
        if (reason := show_job(service, job.id)["waiting"]) is not None and not wait:
            app.notify(f"job {job.id}: waiting for the {reason}")
        if not wait:
            document = {"job": job.id, "state": job.state.value}
            app.answer(document, lambda: f"job {job.id} is {job.state.value}")
            return 0
        row = wait_for_job(service, job.id, notify=app.notify)
        view, code = show_job(service, row.id), exit_code(service, row)
    app.answer(view, lambda: job_text(view))
    return code


def notify_queued(app: App, submitted: Submitted) -> None:
    """Say what was queued and how to go on."""
    job, counts = submitted.job, submitted.counts
    known = f"{counts.cached} done, going on with it" if submitted.resumed else f"{counts.cached} cached"
    app.notify(f"job {job.id}: {job.recipe_name} on {job.model_name}, {counts.total} tasks, {known}")
    app.notify(f"  {app.command('jobs', 'logs', '-f', job.id)}    # what happens")
    app.notify(f"  {app.command('jobs', 'cancel', job.id)}    # stop it")


def _memory(found: DryRun, part: dict[str, Any]) -> int | None:
    """Return the most that a task on a component takes, bytes; None if there is none to run."""
    is_encoder = part["name"].startswith("text_encoder")
    own = part["name"] if is_encoder or not part["quantized"] else DENOISER
    return found.estimate.component_memory.get(own)


def dry_run_text(found: DryRun) -> str:
    """Return an estimate for a person."""
    total = found.estimate
    rows = [
        (name, kind.tasks, kind.cached, human_seconds(kind.seconds) if kind.tasks > kind.cached else None)
        for name, kind in total.per_kind.items()
    ]
    to_run = total.tasks - total.cached
    lines = [
        f"{found.recipe} on {found.model}: {total.tasks} tasks, {total.cached} cached, {to_run} to run",
        "",
        table(("KIND", "TASKS", "CACHED", "CPU TIME"), rows),
        "",
        f"estimated time  {human_seconds(total.seconds)}, {found.workers} tasks at once",
        f"peak memory     {human_bytes(total.peak_memory_bytes)}, all processes together",
    ]
    if found.components:
        parts = [
            (
                part["name"],
                human_bytes(part["bytes"]),
                part["format"] or "as it is",
                human_bytes(memory) if (memory := _memory(found, part)) else None,
            )
            for part in found.components
        ]
        lines += ["", table(("COMPONENT", "SIZE", "IN THE RELEASE", "MEMORY OF ITS TASKS, EACH"), parts)]
    if (prompts := total.component_memory.get(PROMPTS)) is not None:
        lines.append(f"encoding prompts takes {human_bytes(prompts)}")
    return "\n".join(lines)
