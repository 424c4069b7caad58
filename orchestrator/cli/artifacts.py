"""`quantmill artifacts`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from orchestrator.actions.diff import compare_releases
from orchestrator.actions.export import DIFFUSERS, export_release
from orchestrator.actions.garbage import GRACE_SECONDS, collect_garbage
from orchestrator.actions.integrity import repair_store, survey_store
from orchestrator.actions.layer_table import release_layers
from orchestrator.actions.releases import get_release, verify_release
from orchestrator.actions.repair import remake
from orchestrator.actions.signing import check_signature, read_signing_key, sign_release, verify_folder
from orchestrator.actions.views import release_view
from orchestrator.cli.app import App, Group, pass_app
from orchestrator.cli.jobs import metric_lines
from orchestrator.cli.keys import key_option
from orchestrator.cli.numbers import FiniteRange
from orchestrator.cli.pull import artifacts_pull
from orchestrator.db.releases import list_releases, set_alias
from orchestrator.text import table
from quant_spec.enums import ExportFormat, KernelBackend
from quant_spec.formats import ActivationSpec, LayerSpec, WeightSpec
from quant_spec.layer_bits import LayerBits, activation_bits_text, weight_bits_text
from quant_spec.metrics import Place, headings, lines
from quant_spec.numbers import human_bytes
from workers.storage.signature import VerifyingKey, load_verifying_key


@click.group(cls=Group)
def artifacts() -> None:
    """List, pull, verify, name and compare releases.

    REF is NAME@VERSION, NAME@ALIAS, NAME (its latest), or a unique beginning of a digest.
    """


artifacts.add_command(artifacts_pull)


@artifacts.command("ls")
@click.option("--name", help="Only releases of this name.")
@pass_app
def artifacts_ls(app: App, name: str | None) -> None:
    """List releases."""
    with app.service() as service, service.database.session(read_only=True) as session:
        views = [release_view(row) for row in list_releases(session, name)]
    app.answer(views, lambda: _release_table(views))


@artifacts.command("show")
@click.argument("ref")
@click.option("--layers", is_flag=True, help="Each layer: format, bytes, and how it runs on the device at hand.")
@click.option("--device", show_default="cpu", help="With --layers: cpu, cuda or cuda:N.")
@click.option(
    "--backend", type=click.Choice([each.value for each in KernelBackend]), show_default="auto", help="With --layers."
)
@pass_app
def artifacts_show(app: App, ref: str, layers: bool, device: str | None, backend: str | None) -> None:
    """Show one release and its metrics, or its layers."""
    if not layers and (device or backend):
        raise click.UsageError("--device, --backend: got one without --layers, wanted it too")
    if layers:
        with app.service() as service:
            found = release_layers(service, ref, device=device or "cpu", backend=KernelBackend(backend or "auto"))
        app.answer(found, lambda: _layer_table(found))
        return
    with app.service() as service:
        view = release_view(get_release(service, ref))
    facts = [
        ("release", f"{view['name']}@{view['version']}"),
        ("digest", view["digest"]),
        ("aliases", ", ".join(view["aliases"])),
        ("job", view["job"]),
        ("created", view["created_at"]),
        *metric_lines(view["metrics"]),
    ]
    app.answer(view, lambda: "\n".join(f"{name:<9} {value}" for name, value in facts))


@artifacts.command("verify")
@click.argument("ref", required=False)
@click.option("--all", "everything", is_flag=True, help="All that models, releases, results and jobs refer to.")
@click.option("--repair", is_flag=True, help="Queue what makes the lost bytes again, and nothing else.")
@key_option
@pass_app
def artifacts_verify(app: App, ref: str | None, everything: bool, repair: bool, key_file: Path | None) -> int:
    """Read every byte of a release in the store, or of everything.

    REF may also be a folder that `artifacts pull` wrote, as ./NAME. With --key, it must be signed by that key too.

    Exit code 2 if something is missing or damaged; with --repair, if some of it cannot be made again, as a model's
    files, which must be added again.
    """
    if (ref is None) != everything:
        raise click.UsageError("artifacts verify: wanted either REF or --all")
    if ref is not None:
        key = load_verifying_key(key_file) if key_file is not None else None
        return _verify_folder(app, ref, key) if "/" in ref else _verify_one(app, ref, repair, key)
    with app.service() as service:
        survey = survey_store(service)
        repaired = repair_store(service, survey.losses) if repair and survey.losses else None
    document = {
        "blobs": survey.blobs,
        "ok": survey.ok,
        "missing": sum(not loss.damaged for loss in survey.losses),
        "damaged": sum(loss.damaged for loss in survey.losses),
        "losses": [loss.document() for loss in survey.losses],
        "to_be_given": survey.to_be_given,
    }
    if repair:
        document["withdrawn"] = repaired.results if repaired else 0
        document["jobs"] = list(repaired.jobs) if repaired else []
    app.answer(document, lambda: _survey_text(app, document))
    return 2 if survey.to_be_given or (survey.losses and not repair) else 0


def _verify_folder(app: App, name: str, key: VerifyingKey | None) -> int:
    """Verify a release that was pulled into a folder."""
    digest, problems = verify_folder(Path(name), key)
    return _answer_verified(app, name, digest, problems, key, {})


def _verify_one(app: App, ref: str, repair: bool, key: VerifyingKey | None) -> int:
    """Verify one release in the store."""
    more: dict[str, Any] = {}
    with app.service() as service:
        release, lost = verify_release(service, ref)
        if repair:
            more["job"] = remake(service, release.job, lost)
        problems = [*lost.values(), *([] if key is None else check_signature(service, release, key))]
    return _answer_verified(app, release.ref, release.digest, problems, key, more)


def _answer_verified(
    app: App, name: str, digest: str, problems: list[str], key: VerifyingKey | None, more: dict[str, Any]
) -> int:
    """Answer with what was found of one release, and what is done about it."""
    signed_by = key.id if key is not None and not problems else None
    document = {"release": name, "digest": digest, "ok": not problems, "signed_by": signed_by, "problems": problems}
    lines, job = list(problems), more.get("job")
    if job is not None:
        lines.append(f"job {job} makes it again: {app.command('serve', '--drain')}")
    elif problems and "job" in more:
        lines.append("no task of this database gives it any more: submit its recipe again")
    good = f"{name} is complete, every byte as its digest says"
    good += "" if key is None else f", signed by key {key.id[:12]}"
    app.answer(document | more, lambda: "\n".join(lines) or good)
    return 2 if problems and job is None else 0


def _survey_text(app: App, found: dict[str, Any]) -> str:
    """Return what `verify --all` found, for a person."""
    lines = [f"{loss['digest']} is {loss['state']}: {', '.join(loss['of'])}" for loss in found["losses"]]
    counts = ", ".join(f"{found[name]} {name}" for name in ("ok", "missing", "damaged"))
    lines += [f"{found['blobs']} blobs: {counts}", *found["to_be_given"]]
    if "jobs" in found:
        lines.append(f"withdrew {found['withdrawn']} results, which are made again when they are wanted")
        lines += [f"job {job} makes a release again: {app.command('serve', '--drain')}" for job in found["jobs"]]
    elif found["losses"]:
        lines.append(f"what tasks gave is made again by: {app.command('artifacts', 'verify', '--all', '--repair')}")
    return "\n".join(lines)


@artifacts.command("sign")
@click.argument("ref")
@click.option("--key", "key_file", type=click.Path(path_type=Path), metavar="KEY", required=True, help="Private key.")
@pass_app
def artifacts_sign(app: App, ref: str, key_file: Path) -> None:
    """Sign a release that is published already; `run` and `serve` sign what they publish with --sign KEY."""
    key = read_signing_key(key_file)
    with app.service() as service:
        release = sign_release(service, ref, key)
    document = {"release": release.ref, "digest": release.digest, "signed_by": key.id}
    app.answer(document, lambda: f"{release.ref} is signed by key {key.id[:12]}")


@artifacts.command("alias")
@click.argument("ref")
@click.argument("alias", metavar="NAME")
@pass_app
def artifacts_alias(app: App, ref: str, alias: str) -> None:
    """Point the alias NAME at a release, wherever it pointed before: `artifacts alias emoji@3 prod`."""
    with app.service() as service, service.database.session() as session:
        view = release_view(set_alias(session, ref, alias))
    app.answer(view, lambda: f"{view['name']}@{alias} is {view['name']}@{view['version']}")


@artifacts.command("diff")
@click.argument("ref_a", metavar="A")
@click.argument("ref_b", metavar="B")
@pass_app
def artifacts_diff(app: App, ref_a: str, ref_b: str) -> None:
    """Compare two releases: metrics, recipe, bits of each layer."""
    with app.service() as service:
        difference = compare_releases(service, ref_a, ref_b)
    app.answer(difference, lambda: _diff_text(difference))


@artifacts.command("gc")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--grace",
    type=FiniteRange(0),
    default=GRACE_SECONDS / 3600,
    show_default=True,
    metavar="HOURS",
    help="Keep what was stored within the last HOURS, by the store's clock.",
)
@click.option("--yes", is_flag=True, help="Also if that is more than a third of the store's bytes.")
@pass_app
def artifacts_gc(app: App, dry_run: bool, grace: float, yes: bool) -> None:
    """Remove from the store what no model, recorded result, release or job refers to.

    Only from the store that belongs to this database.
    """
    with app.service() as service:
        garbage = collect_garbage(service, grace_seconds=grace * 3600, dry_run=dry_run, any_share=yes)
    document = {**asdict(garbage), "dry_run": dry_run}
    verb = "would remove" if dry_run else "removed"
    app.answer(document, lambda: f"{verb} {garbage.blobs} blobs ({human_bytes(garbage.bytes)}), kept {garbage.kept}")


@artifacts.command("export")
@click.argument("ref")
@click.option(
    "--format", "layout", type=click.Choice([DIFFUSERS, *map(str, ExportFormat)]), required=True, help="Layout."
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="New folder; NAME-VERSION-FORMAT by default."
)
@pass_app
def artifacts_export(app: App, ref: str, layout: str, out: Path | None) -> None:
    """Write a release in another layout.

    diffusers: the denoiser and the scheduler in folders of their own, weights packed. dequantized: the same with plain
    float16 weights, which any diffusers loads. gguf: the codes of a transformer's Linear layers in GGUF's blocks of 32,
    scales rounded to float16; comfy-gguf: the same in the names that ComfyUI-GGUF knows. Activations are not quantized
    in these. comfy-int8: 8-bit codes in ComfyUI's own layout. modelopt-fp8: E4M3 weights, and scales of inputs, in
    ModelOpt's.
    """
    chosen = None if layout == DIFFUSERS else ExportFormat(layout)
    with app.service() as service:
        known = get_release(service, ref)
        folder = out or Path(f"{known.name}-{known.version}-{layout}")
        exported = export_release(service, ref, chosen, folder)
    written = exported.release.ref
    document = {"release": written, "format": layout, "folder": str(folder.absolute()), **exported.metrics}
    types = ", ".join(f"{count} {name}" for name, count in exported.metrics.get("types", {}).items())
    app.answer(document, lambda: f"{written} as {layout} is in {folder}{types and f' (tensors: {types})'}")


def _release_table(views: list[dict[str, Any]]) -> str:
    if not views:
        return "no releases yet; quantmill run RECIPE --model M publishes one"
    columns = headings(Place.RELEASES)
    rows = []
    for view in views:
        shown = lines(Place.RELEASES, view["metrics"])
        rows.append(
            (
                f"{view['name']}@{view['version']}",
                view["digest"][:12],
                human_bytes(view["bytes"]),
                *(shown[name][1] if name in shown else None for name in columns),
                ", ".join(view["aliases"]),
                view["created_at"],
            )
        )
    return table(("RELEASE", "DIGEST", "SIZE", *columns.values(), "ALIASES", "CREATED"), rows)


def _layer_table(found: dict[str, Any]) -> str:
    rows = []
    for each in found["layers"]:
        spec = LayerSpec.from_json(each)
        rows.append(
            (
                each["layer"],
                _weight_text(spec.weight, spec.low_rank) + (f" in {len(spec.split)} parts" if spec.split else ""),
                _activation_text(spec.activation) + _channels_text(spec),
                human_bytes(each["bytes"]),
                each["backend"],
                each["reason"],
            )
        )
    head = f"{found['release']} on {found['device']}, {found['backend']} backend"
    return f"{head}\n\n" + table(("LAYER", "WEIGHTS", "INPUT", "BYTES", "RUNS ON", "HOW OR WHY"), rows)


def _weight_text(weight: WeightSpec, low_rank: int) -> str:
    group = f" of {weight.group_size}" if weight.group_size else ""
    group += ", integer scales" if weight.is_multiplied else ""
    rank = f" + rank {low_rank}" if low_rank else ""
    return f"{weight_bits_text(weight)} {weight.granularity}{group}{rank}"


def _activation_text(activation: ActivationSpec | None) -> str:
    return "float" if activation is None else f"{activation_bits_text(activation)} {activation.mode}"


def _channels_text(spec: LayerSpec) -> str:
    changed = [verb for verb, has in (("scaled", spec.channel_scale), ("shifted", spec.channel_shift)) if has]
    return f", {' and '.join(changed)} channels" if changed else ""


def _diff_text(difference: dict[str, Any]) -> str:
    a, b = difference["a"], difference["b"]
    parts = ["the same bytes" if difference["same_bytes"] else "different bytes"]
    metrics = [(name, _number(pair["a"]), _number(pair["b"])) for name, pair in difference["metrics"].items()]
    parts.append(table(("METRIC", a, b), metrics))
    if difference["recipe"]:
        recipe = [(name, _shown(pair["a"]), _shown(pair["b"])) for name, pair in difference["recipe"].items()]
        parts.append(table(("RECIPE", a, b), recipe))
    if difference["layers"]:
        layers = [(row["layer"], _bits(row["a"]), _bits(row["b"])) for row in difference["layers"]]
        parts.append(table(("LAYER, BITS W/A", a, b), layers))
    return "\n\n".join(parts)


def _number(value: Any) -> str | None:
    return f"{value:.6g}" if isinstance(value, int | float) else None


def _shown(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _bits(bits: dict[str, Any] | None) -> str:
    return "float" if bits is None else LayerBits.from_json(bits).text
