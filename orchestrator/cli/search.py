"""`quantmill search`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from orchestrator.actions.search_dry_run import SearchDryRun, dry_run_search
from orchestrator.actions.search_submission import SearchRequest, extend_search, submit_search
from orchestrator.actions.searches import (
    pareto_view,
    run_search,
    search_exit_code,
    show_search,
    show_searches,
    smallest_models,
)
from orchestrator.actions.sensitivity import MOST_LAYERS, SearchTables, find_sensitivities, sensitivity_text
from orchestrator.cli.app import App, Group, pass_app
from orchestrator.cli.numbers import FiniteRange
from orchestrator.db.rows import SearchRow
from orchestrator.db.searches import cancel_search, find_search
from orchestrator.logs import log_format, log_to_stderr
from orchestrator.report.write import write_search_report
from orchestrator.scheduling.scheduler import stop_on_signals
from orchestrator.states import ACTIVE_JOBS, JobState
from orchestrator.text import human_seconds, table
from quant_spec.numbers import human_bytes

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=Group)
def search() -> None:
    """Search bit widths for many models. SEARCH is an id, a unique beginning of one, or a search's name."""


def _request_options(function: F) -> F:
    """Give a command the options that make up a search."""
    options = (
        click.argument("spec"),
        click.option(
            "--set", "overrides", metavar="A.B=V", multiple=True, help="Change a value of the search; may be repeated."
        ),
        click.option(
            "--only", type=click.Choice(["sensitivity"]), help="Only what each choice does to the model; measure none."
        ),
        click.option("--skip-bad", is_flag=True, help="Go on without models that cannot be used."),
        click.option("--priority", type=int, default=0, show_default=True, help="Higher goes first."),
        click.option("--dry-run", is_flag=True, help="Queue nothing; say how many tasks, how long, how much store."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@search.command("run")
@_request_options
@click.option(
    "--damage", type=FiniteRange(0), metavar="X", help="Say the smallest file predicted to do at most this damage."
)
@click.option(
    "--psnr-db", type=FiniteRange(), metavar="X", help="Say the smallest file predicted to reach at least this PSNR."
)
@pass_app
def search_run(
    app: App,
    spec: str,
    overrides: tuple[str, ...],
    only: str | None,
    skip_bad: bool,
    priority: int,
    dry_run: bool,
    damage: float | None,
    psnr_db: float | None,
) -> int:
    """Queue a search and execute it here, with the front so far. SPEC is a YAML file.

    Ctrl-C stops at once and loses at most the tasks in flight; the same `quantmill search run` again goes on with it,
    and so does `quantmill serve` (exit code 101).
    """
    log_to_stderr(log_format(os.environ))
    with app.service() as service, stop_on_signals() as stop:
        request = SearchRequest(spec, overrides, only, skip_bad, priority, here=True)
        if dry_run:
            _answer_dry_run(app, dry_run_search(service, request, notify=app.notify))
            return 0
        row = submit_search(service, request, notify=app.notify)
        _notify_queued(app, row)
        row = run_search(service, row, stop)
        view = show_search(service, row.id)
        text = search_text(app, view)
        if row.state in ACTIVE_JOBS:
            app.notify(f"search {row.id} is not finished; go on with: {app.command('search', 'run', spec)}")
        elif row.state is JobState.SUCCEEDED:
            view |= {"report": str(write_search_report(service, row.id))}
            text += f"\n\nreport    {view['report']}"
            if only is not None:
                text = f"{text}\n\n{_sensitivity_texts(find_sensitivities(service, row.id))}"
        if damage is not None or psnr_db is not None:
            view |= {"smallest": smallest_models(view, damage, psnr_db)}
            text += "\n\n" + _smallest_text(view["smallest"])
    app.answer(view, lambda: text)
    return search_exit_code(row)


def _sensitivity_texts(found: SearchTables, start: str | None = None, most: int = MOST_LAYERS) -> str:
    """Return for a person which layers of each model cost most, and where bits pay."""
    return "\n\n".join(
        sensitivity_text(
            table,
            model=each.model if len(each.tables) == 1 else f"{each.model}, variant {variant}",
            order=each.order,
            front=each.front if place == 0 else (),
            start=start,
            most=most,
        )
        for each in found.models
        for place, (variant, table) in enumerate(each.tables.items())
    )


def _smallest_text(smallest: dict[str, Any]) -> str:
    """Return the answer to the inverse question for a person."""
    lines = []
    for name, found in smallest.items():
        if found is None:
            lines.append(f"{name}: nothing is predicted to reach that")
        else:
            quality = "" if found["psnr_db"] is None else f", {found['psnr_db']:.1f} dB"
            size = human_bytes(found["bytes"], 2)
            lines.append(f"{name}: {size} is the smallest, predicted damage {found['damage']:.3g}{quality}")
    return "\n".join(lines)


@search.command("submit")
@_request_options
@pass_app
def search_submit(
    app: App,
    spec: str,
    overrides: tuple[str, ...],
    only: str | None,
    skip_bad: bool,
    priority: int,
    dry_run: bool,
) -> None:
    """Queue a search; `quantmill serve` executes it. SPEC is a YAML file."""
    with app.service() as service:
        request = SearchRequest(spec, overrides, only, skip_bad, priority)
        if dry_run:
            _answer_dry_run(app, dry_run_search(service, request, notify=app.notify))
            return
        row = submit_search(service, request, notify=app.notify)
    _notify_queued(app, row)
    app.notify(f"  {app.command('serve', '--drain')}    # execute what is queued, if nothing does")
    app.answer({"search": row.id, "state": row.state.value}, lambda: f"search {row.id} is {row.state.value}")


@search.command("ls")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, newest first.")
@pass_app
def search_ls(app: App, limit: int) -> None:
    """List searches, newest first."""
    with app.service(need_store=False) as service:
        views = show_searches(service, limit)
    app.answer(views, lambda: _search_table(views))


@search.command("show")
@click.argument("search_id", metavar="SEARCH")
@pass_app
def search_show(app: App, search_id: str) -> None:
    """Show a search: each model's points, what was dropped and why, and what it cost."""
    with app.service(need_store=False) as service:
        view = show_search(service, search_id)
    app.answer(view, lambda: search_text(app, view))


@search.command("pareto")
@click.argument("search_id", metavar="SEARCH")
@pass_app
def search_pareto(app: App, search_id: str) -> None:
    """Show only the fronts: points measured with the full protocol that no other point beats."""
    with app.service(need_store=False) as service:
        view = pareto_view(show_search(service, search_id))
    app.answer(view, lambda: search_text(app, view))


@search.command("cancel")
@click.argument("search_id", metavar="SEARCH")
@pass_app
def search_cancel(app: App, search_id: str) -> None:
    """Cancel a search and its jobs; tasks that other jobs want go on."""
    with app.service(need_store=False) as service:
        with service.database.session() as session:
            row = find_search(session, search_id)
            cancel_search(session, row.id)
        view = show_search(service, row.id)
    app.answer(view, lambda: f"search {view['search']} is {view['state']}")


@search.command("extend")
@click.argument("search_id", metavar="SEARCH")
@click.option("--models", multiple=True, metavar="M", help="More models: names, folders, globs of either, hf:ID.")
@click.option("--budget", "budgets", multiple=True, metavar="LIMIT=V", help="One more budget, as bytes=2.8MB.")
@click.option("--skip-bad", is_flag=True, help="Go on without models that cannot be used.")
@pass_app
def search_extend(app: App, search_id: str, models: tuple[str, ...], budgets: tuple[str, ...], skip_bad: bool) -> None:
    """Add models or budgets to a search, open or ended: it goes on, and only what is new is computed."""
    with app.service() as service:
        row = extend_search(service, search_id, models=models, budgets=budgets, skip_bad=skip_bad, notify=app.notify)
    app.notify(f"  {app.command('serve', '--drain')}    # execute what is queued, if nothing does")
    app.answer({"search": row.id, "state": row.state.value}, lambda: f"search {row.id} is {row.state.value}")


@search.command("report")
@click.argument("search_id", metavar="SEARCH")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.html", help="By default in HOME/reports."
)
@pass_app
def search_report(app: App, search_id: str, out: Path | None) -> None:
    """Write the report of a search, ended or not: one HTML file that needs nothing else."""
    with app.service() as service:
        path = write_search_report(service, search_id, out)
    app.answer({"report": str(path)}, lambda: str(path))


@search.command("sensitivity")
@click.argument("search_id", metavar="SEARCH")
@click.option("--model", metavar="M", help="Only this one of its models.")
@click.option("--start", metavar="BITS", help="Weight bits that all layers start from; by default the middle ones.")
@click.option("--layers", type=click.IntRange(1), default=MOST_LAYERS, show_default=True, help="Layers of each list.")
@pass_app
def search_sensitivity(app: App, search_id: str, model: str | None, start: str | None, layers: int) -> None:
    """Show which layers cost most, where the next bit pays most, and where bits are missed least."""
    with app.service() as service:
        found = find_sensitivities(service, search_id, model)
    view = {
        "search": found.search,
        "models": {each.model: {"tables": each.tables, "front": each.front} for each in found.models},
    }
    text = _sensitivity_texts(found, start, layers)
    app.answer(view, lambda: text)


def _answer_dry_run(app: App, found: SearchDryRun) -> None:
    """Say what a search would take."""
    rows = [
        (name, each.tasks, each.cached, human_seconds(sum(kind.seconds for kind in each.per_kind.values())))
        for name, each in found.models.items()
    ]
    lines = [
        f"{found.name}: about {found.tasks} tasks, {found.cached} cached, {found.tasks - found.cached} to run",
        "",
        table(("MODEL", "TASKS PLANNED", "CACHED", "CPU TIME"), rows),
        "",
        f"estimated time  {human_seconds(found.seconds)}, {found.workers} tasks at once",
        f"store           about {human_bytes(found.store_bytes)}",
    ]
    app.answer(found.document(), lambda: "\n".join(lines))


def _notify_queued(app: App, row: SearchRow) -> None:
    """Say what was queued and how to look at it."""
    app.notify(f"search {row.id}: {row.name}")
    app.notify(f"  {app.command('search', 'show', row.id)}    # its points")
    app.notify(f"  {app.command('search', 'cancel', row.id)}    # stop it")


def search_text(app: App, view: dict[str, Any]) -> str:
    """Return a search for a person: its facts, then each model's points."""
    tasks = view["tasks"]
    counts = ", ".join(f"{tasks[name]} {name}" for name in tasks if name != "total" and tasks[name])
    facts = [
        ("search", view["search"]),
        ("name", view["name"]),
        ("state", view["state"]),
        ("waiting", view.get("waiting")),
        ("tasks", f"{tasks['total']}" + (f" ({counts})" if counts else "")),
        ("time", human_seconds(view["seconds"])),
        ("spent", f"{human_seconds(view['task_seconds'])} of tasks, {human_seconds(view['saved_seconds'])} saved"),
    ]
    lines = [f"{name:<9} {value}" for name, value in facts if value is not None]
    for name, points in view["models"].items():
        stage = view["stages"][name]
        at = f"{stage['stage']} {stage['round']}/{stage['rounds']}" if stage["stage"] == "screening" else stage["stage"]
        lines += ["", f"{name}: {view['errors'].get(name) or at}"]
        if points:
            lines.append(_point_table(points))
    released = [point["release"] for points in view["models"].values() for point in points if point["release"]]
    if released:
        folder = released[0].replace("@", "-")
        lines += [
            "",
            "next:",
            f"  {app.command('artifacts', 'pull', released[0], folder)}    # a folder that diffusers loads",
        ]
    return "\n".join(lines)


def _point_table(points: list[dict[str, Any]]) -> str:
    rows = [
        (
            point["number"],
            point["origin"],
            "*" if point["on_front"] else "",
            None if point["bytes"] is None else human_bytes(point["bytes"], 2),
            None if point["bits_mean"] is None else f"{point['bits_mean']:.2f}",
            None if point["psnr_db"] is None else f"{point['psnr_db']:.2f}",
            point["n"],
            point["release"] or point["dropped"] or "",
        )
        for point in points
    ]
    return table(("POINT", "FROM", "FRONT", "SIZE", "BITS", "PSNR", "N", "RELEASE, OR WHY IT WAS DROPPED"), rows)


def _search_table(views: list[dict[str, Any]]) -> str:
    if not views:
        return "no searches yet; quantmill search run SPEC makes one"
    rows = [
        (
            view["search"],
            view["name"],
            view["state"],
            f"{view['done']}/{view['models']}",
            view["points"],
            view["releases"],
            human_seconds(view["seconds"]),
            view["owner"],
            view["created_at"],
        )
        for view in views
    ]
    return table(("SEARCH", "NAME", "STATE", "MODELS", "POINTS", "RELEASES", "TIME", "OWNER", "CREATED"), rows)
