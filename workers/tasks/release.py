"""Release: the packed model, what was measured of it and where it came from, composed to what is published.

Nothing of it depends on when or where it ran. Metrics: `metrics`, as in metrics.json, which is the score;
`artifact_bytes`, the size of all files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from quant_core.artifact.card import CardContent, check_metrics, render_card
from quant_core.artifact.folder import CONFIG_FILE, RECIPE_FILE, SCHEDULER_FILE
from quant_core.diffusion.corrected_scheduler import is_corrected
from quant_spec.documents import read_json
from quant_spec.kinds import KINDS
from quant_spec.passes.table import kinds_of
from quant_spec.pipeline import MODEL_INDEX, denoiser_entry, is_whole
from quant_spec.tasks.release import ARTIFACT, Inputs, Origin, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_files
from workers.storage.store import Store

#: Paths to digest and bytes.
Files = dict[str, tuple[str, int]]

METRICS_FILE = "metrics.json"
PROVENANCE_FILE = "provenance.json"
CARD_FILE = "README.md"
_PACKAGES = ("diffusers", "numpy", "quantmill", "safetensors", "torch")


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Compose the artifact of a release."""
    store = context.store
    files = read_files(store, inputs.packed)
    if CONFIG_FILE not in files:
        raise TaskError(f"packed tree: got {', '.join(sorted(files))}, wanted a {CONFIG_FILE} among them")
    metrics = _read_metrics(store, inputs.score)
    check_metrics(metrics)
    config = read_json(store.get_bytes(files[CONFIG_FILE][0]), CONFIG_FILE)
    index = _pipeline_index(inputs.model, store)
    card = render_card(
        CardContent(
            base_model=_base_model(params.model),
            recipe=params.recipe.name,
            config=config,
            metrics=metrics,
            corrected=_is_corrected(files, store),
            pipeline=index,
        )
    )
    if index is not None:
        files = _in_pipeline(files, index, inputs.whole or inputs.model, store)
    texts = {
        METRICS_FILE: _json(metrics),
        PROVENANCE_FILE: _json(provenance(params, inputs)),
        RECIPE_FILE: _json(params.recipe.config),
        CARD_FILE: card,
    }
    for path, text in texts.items():
        data = text.encode()
        files[path] = (store.put_bytes(data), len(data))
    digest = put_manifest(store, files)
    size = sum(size for _, size in files.values())
    return TaskOutput({ARTIFACT: digest}, {"metrics": metrics, "artifact_bytes": size})


def _pipeline_index(model: str, store: Store) -> dict[str, Any] | None:
    """Return the index of the whole pipeline that a model is; None for a bare denoiser."""
    files = read_files(store, model)
    index = read_json(store.get_bytes(files[MODEL_INDEX][0]), MODEL_INDEX) if MODEL_INDEX in files else None
    return index if is_whole(index) else None


def _in_pipeline(packed: Files, index: Mapping[str, Any], model: str, store: Store) -> Files:
    """Return a pipeline's files with the packed denoiser and its scheduler in place of the model's own.

    All other components are the same blobs as the model's.
    """
    home = denoiser_entry(index)
    files = {
        path: entry
        for path, entry in read_files(store, model).items()
        if path.partition("/")[0] not in (home, "scheduler")
    }
    for path, entry in packed.items():
        files[path if path == SCHEDULER_FILE else f"{home}/{path}"] = entry
    scheduler = read_json(store.get_bytes(packed[SCHEDULER_FILE][0]), SCHEDULER_FILE)["_class_name"]
    data = _json({**index, "scheduler": ["diffusers", scheduler]}).encode()
    return files | {MODEL_INDEX: (store.put_bytes(data), len(data))}


def provenance(params: Params, inputs: Inputs[str]) -> dict[str, Any]:
    """Return what a release was made from and by: models, data, seeds, versions."""
    model, recipe = params.model, params.recipe
    sections = {name: recipe.config.get(name, {}) for name in ("calibration", "evaluation")}
    seeds = {name: {key: section.get(key) for key in ("first_seed", "seeds")} for name, section in sections.items()}
    return {
        "model": model.to_json(),
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        "seeds": seeds | {"recipe": recipe.config.get("seed")},
        "inputs": {name: list(digests) for name, digests in inputs.to_json().items()},
        # of the kinds that a release depends on: the version of any other must not change its bytes
        "task_versions": {name: KINDS[name].version for name in kinds_of(recipe.config)},
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _is_corrected(files: Mapping[str, tuple[str, int]], store: Store) -> bool:
    """Whether the packed scheduler corrects predictions."""
    return SCHEDULER_FILE in files and is_corrected(
        read_json(store.get_bytes(files[SCHEDULER_FILE][0]), SCHEDULER_FILE)
    )


def _base_model(model: Origin) -> str:
    """Return the Hub's `owner/name` of a model from there, else its registered name."""
    source = model.source or ""
    return source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else model.name


def _read_metrics(store: Store, digest: str) -> dict[str, Any]:
    """Return the metrics that a score is."""
    score = read_json(store.get_bytes(digest), digest[:12])
    if not isinstance(score, dict):
        raise TaskError(f"score {digest[:12]}: got a JSON {type(score).__name__}, wanted an object of metrics")
    return score


def _version(package: str) -> str | None:
    """Return the public part of a package's version: which build of torch it is depends on the machine."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
