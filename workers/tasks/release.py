"""Release: the packed model, what was measured of it and where it came from, composed to what is published.

params
    model: {"name", "class_name", "source", "license"}   source: "hf:owner/name@revision" or null; license: or null
    recipe: {"name", "digest", "config"}                 config: the resolved recipe
inputs
    packed: the tree of `pack`; score: the JSON of `score`, whose `metrics` (or whole) are the release's;
    any other name (model, calibration, reference, ...) is recorded as provenance
outputs
    artifact: the tree that names the release
metrics
    metrics: as in metrics.json; artifact_bytes: size of all files

Nothing of it depends on when or where it ran.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from quant_core.artifact.card import CardContent, check_metrics, render_card
from quant_core.artifact.folder import CONFIG_FILE, RECIPE_FILE, SCHEDULER_FILE
from quant_core.diffusion.corrected_scheduler import is_corrected
from quant_spec.kinds import KINDS
from workers.errors import TaskError
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_manifest
from workers.storage.store import Store

METRICS_FILE = "metrics.json"
PROVENANCE_FILE = "provenance.json"
CARD_FILE = "README.md"
# Kinds that a release depends on; the version of any other must not change its bytes.
_STEPS = ("calibrate", "round", "reconstruct", "pack", "reference", "evaluate", "score", "release")
# Those of a recipe that has such a pass, and of one that has bits for each step.
_PASS_STEPS = {
    "temporal": ("temporal",),
    "scale": ("scale",),
    "allocate": ("channel_errors", "allocate"),
    "distill": ("distill",),
    "correct": ("noise", "correct"),
}
_STEP_BITS_STEPS = ("step_effects", "step_bits")
_PACKAGES = ("diffusers", "numpy", "quantmill", "safetensors", "torch")


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Compose the artifact of a release."""
    store = context.store
    files = {
        path: (entry["sha256"], entry["bytes"])
        for path, entry in read_manifest(store, _only(inputs, "packed"))["files"].items()
    }
    if CONFIG_FILE not in files:
        raise TaskError(f"packed tree: got {', '.join(sorted(files))}, wanted a {CONFIG_FILE} among them")
    metrics = _read_metrics(store, _only(inputs, "score"))
    check_metrics(metrics)
    config = json.loads(store.get_bytes(files[CONFIG_FILE][0]))
    card = render_card(
        CardContent(
            base_model=_base_model(params["model"]),
            recipe=params["recipe"]["name"],
            config=config,
            metrics=metrics,
            license=params["model"].get("license"),
            corrected=_is_corrected(files, store),
        )
    )
    texts = {
        METRICS_FILE: _json(metrics),
        PROVENANCE_FILE: _json(provenance(params, inputs)),
        RECIPE_FILE: _json(params["recipe"]["config"]),
        CARD_FILE: card,
    }
    for path, text in texts.items():
        data = text.encode()
        files[path] = (store.put_bytes(data), len(data))
    digest = put_manifest(store, files)
    size = sum(size for _, size in files.values())
    return TaskOutput({"artifact": digest}, {"metrics": metrics, "artifact_bytes": size})


def provenance(params: Params, inputs: Inputs) -> dict[str, Any]:
    """Return what a release was made from and by: models, data, seeds, versions."""
    model, recipe = params["model"], params["recipe"]
    sections = {name: recipe["config"].get(name, {}) for name in ("calibration", "evaluation")}
    seeds = {name: {key: section.get(key) for key in ("first_seed", "seeds")} for name, section in sections.items()}
    return {
        "model": {key: model.get(key) for key in ("name", "class_name", "source")},
        "recipe": {"name": recipe["name"], "digest": recipe["digest"]},
        "seeds": seeds | {"recipe": recipe["config"].get("seed")},
        "inputs": {name: list(digests) for name, digests in inputs.items()},
        "task_versions": {name: KINDS[name].version for name in _steps(recipe["config"])},
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _is_corrected(files: Mapping[str, tuple[str, int]], store: Store) -> bool:
    """Whether the packed scheduler corrects predictions."""
    return SCHEDULER_FILE in files and is_corrected(json.loads(store.get_bytes(files[SCHEDULER_FILE][0])))


def _steps(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds of task that a recipe's releases depend on."""
    passes = config.get("passes", {})
    optional = [step for name, steps in _PASS_STEPS.items() if passes.get(name) is not None for step in steps]
    mixed = config.get("activations", {}).get("step_bits") is not None
    return (*_STEPS, *optional, *(_STEP_BITS_STEPS if mixed else ()))


def _base_model(model: Mapping[str, Any]) -> str:
    """Return the Hub's `owner/name` of a model from there, else its registered name."""
    source = model.get("source") or ""
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else str(model["name"])


def _read_metrics(store: Store, digest: str) -> dict[str, Any]:
    """Return the metrics in a score."""
    score = json.loads(store.get_bytes(digest))
    metrics = score.get("metrics", score) if isinstance(score, dict) else None
    if not isinstance(metrics, dict):
        raise TaskError(f"score {digest[:12]}: got a JSON {type(score).__name__}, wanted an object of metrics")
    return metrics


def _version(package: str) -> str | None:
    """Return the public part of a package's version: which build of torch it is depends on the machine."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _only(inputs: Inputs, name: str) -> str:
    """Return the one digest of an input."""
    digests = inputs.get(name, [])
    if len(digests) != 1:
        raise TaskError(f"input {name}: got {len(digests)} digests, wanted 1")
    return digests[0]


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
