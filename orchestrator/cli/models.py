"""`quantmill models`."""

from __future__ import annotations

from typing import Any

import click

from orchestrator.actions.lora import Lora, with_loras
from orchestrator.actions.registration import add_model_from, register, resolve_model
from orchestrator.actions.views import model_view
from orchestrator.cli.app import App, Group, pass_app
from orchestrator.cli.lora import lora_option
from orchestrator.cli.sample_size import sample_size_option
from orchestrator.db.registry import find_model, list_models
from orchestrator.planning.conditioning import missing_conditioning
from orchestrator.planning.pipeline import pipeline_of
from orchestrator.text import table
from quant_spec.numbers import human_bytes, human_count
from workers.storage.model_folder import SampleSize


@click.group(cls=Group)
def models() -> None:
    """Register and show models."""


@models.command("add")
@click.argument("source", metavar="PATH|hf:ID")
@click.option("--name", help="Name to register it under; the folder's by default.")
@lora_option
@sample_size_option
@pass_app
def models_add(
    app: App, source: str, name: str | None, loras: tuple[Lora, ...], sample_size: SampleSize | None
) -> None:
    """Check a diffusers folder, copy it into the store and register it; hf:owner/name@revision comes from the Hub.

    What is registered stays: of a folder that has changed since, a new model is registered, under its name and some
    digits of its digest if the name is taken.
    """
    with app.service() as service:
        if loras:
            base = resolve_model(service, source, notify=app.notify, register=False, sample_size=sample_size)
            row = register(service, with_loras(service, base, loras, notify=app.notify), notify=app.notify, name=name)
        else:
            row = add_model_from(service, source, name, notify=app.notify, sample_size=sample_size)
        view = model_view(row)
    app.answer(view, lambda: _added(view))
    problem = (pipeline_of(row) or {}).get("problem")
    if problem is not None:
        app.notify(f"note: its pipeline cannot be quantized: {problem}")
        return
    if pipeline_of(row) is None and (missing := missing_conditioning(row)):
        app.notify(f"note: it has no {', '.join(missing)} yet; jobs want conditioning.safetensors beside the model")
        return
    app.notify(
        f"next: {app.command('run', 'RECIPE', '--model', view['name'])}    (recipes: {app.command('recipes', 'ls')})"
    )


@models.command("ls")
@pass_app
def models_ls(app: App) -> None:
    """List the registered models."""
    with app.service() as service, service.database.session(read_only=True) as session:
        views = [model_view(row) for row in list_models(session)]
    rows = [
        (
            view["name"],
            view["digest"][:12],
            view["class_name"],
            human_count(view["parameters"]),
            human_bytes(view["bytes"]),
            view["source"],
        )
        for view in views
    ]
    empty = "no models yet; quantmill models add PATH registers one"
    app.answer(
        views, lambda: table(("NAME", "DIGEST", "CLASS", "PARAMETERS", "SIZE", "SOURCE"), rows) if rows else empty
    )


@models.command("show")
@click.argument("name")
@pass_app
def models_show(app: App, name: str) -> None:
    """Show a model and its units; NAME may be NAME@DIGEST or a unique beginning of the digest."""
    with app.service() as service, service.database.session(read_only=True) as session:
        row = find_model(session, name)
    view = {**model_view(row), "inspection": row.inspection}
    facts = (
        ("name", row.name),
        ("digest", row.digest),
        ("class", row.class_name),
        ("source", row.source),
        ("size", f"{human_bytes(row.bytes)}, {human_count(row.parameters)} parameters"),
        *(("lora", _lora(each)) for each in view["loras"]),
        ("cost", f"{row.inspection['forward_gmacs']:.3f} GMAC for one sample and step"),
    )
    parts = _components(view)
    units = [(unit["name"], len(unit["layers"]), round(unit["gmacs"], 4)) for unit in row.inspection["units"]]
    app.answer(
        view,
        lambda: (
            "\n".join(f"{key:<7} {value}" for key, value in facts)
            + "\n\n"
            + (parts + "\n\n" if parts else "")
            + table(("UNIT", "LAYERS", "GMAC"), units)
        ),
    )


def _lora(fused: dict[str, Any]) -> str:
    """Return what is shown of a file that was fused."""
    return f"{fused['file']}, scale {fused['scale']:g}, sha256 {fused['sha256'][:12]}"


def _added(view: dict[str, Any]) -> str:
    """Say what was registered, and what of a pipeline would be quantized."""
    name = view["class_name"] if view["pipeline"] is None else f"{view['pipeline']}, {view['class_name']}"
    first = f"model {view['name']} ({name}), digest {view['digest'][:12]}"
    parts = _components(view)
    return f"{first}\n\n{parts}" if parts else first


def _otherwise(part: dict[str, Any]) -> str:
    """Say what becomes of a component that is quantized only if a recipe's components name it."""
    return f"as it is, unless components.{part['name']}" if part["can_be"] else "as it is"


def _components(view: dict[str, Any]) -> str:
    """Return a table of a pipeline's components; empty for a bare denoiser."""
    rows = [
        (
            part["name"],
            part["class_name"],
            human_count(part["parameters"]) if part["parameters"] else None,
            human_bytes(part["bytes"]),
            "quantized" if part["quantized"] else _otherwise(part),
        )
        for part in view["components"]
    ]
    return table(("COMPONENT", "CLASS", "PARAMETERS", "SIZE", "IN A RELEASE"), rows) if rows else ""
