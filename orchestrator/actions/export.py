"""Releases in other layouts: a diffusers pipeline, packed, or in a format of other tools."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.actions.local import run_task
from orchestrator.actions.lost_bytes import sending_to_repair
from orchestrator.actions.releases import check_target, get_release, release_home
from orchestrator.db.rows import ReleaseRow
from orchestrator.service import Service
from quant_spec.documents import read_json_file
from quant_spec.enums import ExportFormat
from quant_spec.pipeline import MODEL_INDEX
from quant_spec.tasks import export
from workers.storage.manifest import MANIFEST_NAME, pull_tree

#: Name of the layout that keeps the packed weights.
DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True)
class Exported:
    """The release that was written, and what the task says of it (`workers.tasks.export`)."""

    release: ReleaseRow
    metrics: dict[str, Any]


def export_release(service: Service, ref: str, layout: ExportFormat | None, folder: Path) -> Exported:
    """Write a release into a new folder in the layout of a pipeline: each component in its own.

    Parameters
    ----------
    service
        Knows the release and holds its bytes.
    ref
        name@3, name@alias, name, or a digest's beginning.
    layout
        None keeps the packed weights (needs `import quant_core` to load); others are what `workers.tasks.export` says.
    folder
        Must not exist, or be empty; on any failure nothing is left there.

    Notes
    -----
    A `model_index.json` is added where diffusers has a pipeline that needs nothing else (an unconditional UNet2DModel).
    The release of a whole pipeline has one; its other components are written as they are.
    """
    folder = check_target(folder)
    release = get_release(service, ref)
    digest, home = release.digest, release_home(service.store, release.digest)
    metrics: dict[str, Any] = {}
    if layout is not None:
        params, inputs = export.Params(format=layout), export.Inputs(artifact=digest)
        with sending_to_repair(service, release):
            output = run_task(service.settings, export.KIND, params, inputs)
        digest, metrics = output.outputs[export.MODEL], output.metrics
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-partial-", dir=folder.parent) as scratch:
        pulled, laid_out = Path(scratch, "pulled"), Path(scratch, "out")
        with sending_to_repair(service, release):
            pull_tree(service.store, digest, pulled)
            if home:
                _pull_around(service, release.digest, home, pulled)
        (pulled / MANIFEST_NAME).unlink()
        if home:
            pulled.rename(laid_out)
        else:
            _lay_out(pulled, laid_out)
        laid_out.chmod(0o755)
        laid_out.replace(folder)
    return Exported(release, metrics)


def _pull_around(service: Service, release: str, home: str, pulled: Path) -> None:
    """Put a whole pipeline's release around its denoiser's weights in another format, if those were pulled alone."""
    if (pulled / MODEL_INDEX).is_file():
        return
    pulled.rename(pulled.with_name("plain"))
    pull_tree(service.store, release, pulled)
    shutil.rmtree(pulled / home)
    (pulled / home).mkdir()
    for path in pulled.with_name("plain").iterdir():
        if path.is_dir() and path.name != "scheduler":  # a text encoder that was packed
            for file in path.iterdir():
                file.replace(pulled / path.name / file.name)
        elif path.name not in ("scheduler", MANIFEST_NAME):
            path.rename(pulled / home / path.name)


def _lay_out(pulled: Path, target: Path) -> None:
    """Move the denoiser, the scheduler and the card of a flat folder to where a pipeline has them."""
    config = read_json_file(pulled / "config.json")
    target.mkdir()
    for name in ("scheduler", "README.md"):
        if (pulled / name).exists():
            (pulled / name).rename(target / name)
    part = "unet" if str(config["_class_name"]).startswith("UNet") else "transformer"
    pulled.rename(target / part)
    index = _model_index(config, target / "scheduler" / "scheduler_config.json")
    if index is not None:
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _model_index(config: dict[str, Any], scheduler: Path) -> dict[str, Any] | None:
    """Return what makes the folder a pipeline, None if diffusers has none for just these two parts."""
    conditional = config.get("num_class_embeds") or config.get("class_embed_type")
    if config["_class_name"] != "UNet2DModel" or conditional or not scheduler.is_file():
        return None
    scheduler_class = read_json_file(scheduler)["_class_name"]
    return {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": config.get("_diffusers_version"),
        "scheduler": ["diffusers", scheduler_class],
        "unet": ["diffusers", "UNet2DModel"],
    }
