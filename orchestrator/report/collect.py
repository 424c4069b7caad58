"""From a finished job to what its report shows: rows of the database, blobs of the store."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from orchestrator.actions.diff import release_bits
from orchestrator.actions.releases import read_release_json
from orchestrator.actions.views import recipe_yaml
from orchestrator.db.jobs import find_job, list_tasks
from orchestrator.db.registry import find_model
from orchestrator.db.rows import JobRow, ModelRow, TaskRow
from orchestrator.report.data import CorrectionRow, FeatureRow, KindTime, LayerRow, ReportData, UnitRow
from orchestrator.report.images import Strips, make_strips
from orchestrator.service import Service
from orchestrator.states import JobState
from orchestrator.text import utc_text
from quant_spec.errors import InvalidInputError
from quant_spec.layer_bits import LayerBits
from quant_spec.metrics import Listing, protocol
from workers.storage.store import Store

#: A strip is this many pixels wide at most, and holds this many images at most.
_STRIP_PIXELS, _STRIP_IMAGES = 640, 8


def collect(service: Service, prefix: str) -> ReportData:
    """Gather what the report of a job shows.

    Parameters
    ----------
    service
        Where the job ran.
    prefix
        Of the job's id.

    Raises
    ------
    InvalidInputError
        If the job has not succeeded.
    NotFoundError
        If there is no such job.
    """
    with service.database.session(read_only=True) as session:
        job = find_job(session, prefix)
        if job.state is not JobState.SUCCEEDED or job.digest is None:
            raise InvalidInputError(f"report: got job {job.id}, which is {job.state.value}, wanted one that succeeded")
        model = find_model(session, job.model_digest)
        tasks = list_tasks(session, job.id)
    metrics = job.metrics or {}
    return ReportData(
        job=job.id,
        release=job.release or job.digest[:12],
        digest=job.digest,
        model=job.model_name,
        model_class=model.class_name,
        model_digest=job.model_digest,
        parameters=model.parameters,
        recipe=job.recipe_name,
        recipe_digest=job.recipe_digest,
        recipe_yaml=recipe_yaml(job.recipe),
        finished=utc_text(job.finished_at) or "",
        wall_seconds=(job.finished_at or job.created_at) - job.created_at,
        metrics=metrics,
        protocol=tuple(
            (name.replace("_", " "), _plain(value)) for name, value in protocol(Listing.REPORT, metrics).items()
        ),
        provenance=_provenance(service.store, job, model),
        strips=read_strips(service.store, tasks),
        layers=_layers(service.store, job.digest, model, tasks),
        units=_units(tasks),
        features=_features(tasks),
        step_bits=tuple(_metrics(tasks, "step_bits").get("bits", ())),
        corrections=tuple(map(_correction, _metrics(tasks, "correct").get("steps", ()))),
        kinds=_kind_times(tasks),
    )


def _kind_times(tasks: Sequence[TaskRow]) -> tuple[KindTime, ...]:
    """Sum tasks up by kind, in the order in which kinds first appear; cached ones took their time in another job."""
    kinds: dict[str, list[TaskRow]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    return tuple(
        KindTime(kind, len(rows), sum(row.cached for row in rows), sum(row.seconds or 0.0 for row in rows))
        for kind, rows in kinds.items()
    )


def _provenance(store: Store, job: JobRow, model: ModelRow) -> tuple[tuple[str, str], ...]:
    """Return where the release comes from, as (name, value)."""
    assert job.digest is not None
    stored = read_release_json(store, job.digest, "provenance.json")
    facts = [
        ("release digest", job.digest),
        ("model", f"{model.name}, from {model.source}"),
        ("model digest", job.model_digest),
        ("recipe digest", job.recipe_digest),
    ]
    facts += [
        (name.replace("_", " "), _plain(value)) for name, value in stored.items() if name not in ("model", "recipe")
    ]
    return tuple(facts)


def read_strips(
    store: Store, tasks: Sequence[TaskRow], *, rows: int | None = None, most: int | None = None
) -> tuple[Strips, ...]:
    """Draw the samples that a job's score kept, a few rows of the same seeds.

    Parameters
    ----------
    tasks
        The job's, its score among them.
    rows
        Rows at most; all by default.
    most
        Pixels of an image's longer side; larger ones are made smaller.
    """
    score = next(task for task in tasks if task.kind == "score")
    if score.outputs is None or "samples" not in score.outputs:
        return ()
    images = _tensors(store, score.outputs["samples"])
    reference, quantized = images["reference"], images["quantized"]
    metrics = (score.metrics or {})["metrics"]
    first, prompts = metrics["seeds"]["first"], tuple(metrics.get("shown_prompts", ()))
    seeds = tuple(metrics.get("shown_seeds", range(first, first + len(reference))))
    wide = reference.shape[3] if most is None else min(reference.shape[3], most)
    columns = max(1, min(_STRIP_IMAGES, _STRIP_PIXELS // wide))
    starts = range(0, len(reference), columns)
    return tuple(
        make_strips(
            reference[start : start + columns],
            quantized[start : start + columns],
            seeds[start : start + columns],
            prompts[start : start + columns],
            most=most,
        )
        for start in starts[: len(starts) if rows is None else rows]
    )


def _tensors(store: Store, digest: str) -> dict[str, NDArray[np.float32]]:
    """Read a blob of safetensors."""
    with TemporaryDirectory(prefix="quantmill-report-") as folder:
        path = Path(folder, "blob.safetensors")
        store.get_file(digest, path)
        return dict(load_file(path))


def _layers(store: Store, digest: str, model: ModelRow, tasks: Sequence[TaskRow]) -> tuple[LayerRow, ...]:
    """Return the model's layers in the order of execution, with the bits that the release has them in."""
    bits = release_bits(store, digest)
    errors = _layer_errors(tasks, bits)
    described = model.inspection["layers"]
    rows = []
    for unit in model.inspection["units"]:
        for name in unit["layers"]:
            layer = described[name]
            rows.append(
                LayerRow(
                    name=name,
                    unit=unit["name"],
                    kind=layer["type"],
                    shape=tuple(layer["shape"]),
                    bits=bits.get(name),
                    gmacs=layer["macs"] / 1e9,
                    sqnr_db=errors.get(name),
                )
            )
    return tuple(rows)


def _layer_errors(tasks: Sequence[TaskRow], bits: Mapping[str, LayerBits]) -> dict[str, float]:
    """Return what rounding left of each layer's signal, in dB, by `round`, `menu` at its bits, or `answer`."""
    found: dict[str, float] = {}
    for task in tasks:
        layers = (task.metrics or {}).get("layers", {})
        if task.kind in ("round", "answer"):  # the latter's layers have other codes than before
            found |= {name: values["sqnr_db"] for name, values in layers.items()}
        elif task.kind == "menu":
            at = {name: str(bits[name].weights) for name in layers if name in bits}
            found |= {name: layers[name][width] for name, width in at.items() if width in layers[name]}
    return found


def _units(tasks: Sequence[TaskRow]) -> tuple[UnitRow, ...]:
    """Return the reconstructed units in the order of execution, from the metrics of `reconstruct`."""
    return tuple(
        UnitRow(task.metrics["unit"], task.metrics["sqnr_db_before"], task.metrics["sqnr_db_after"])
        for task in tasks
        if task.kind == "reconstruct" and task.metrics
    )


def _metrics(tasks: Sequence[TaskRow], kind: str) -> Mapping[str, Any]:
    """Return the metrics of the job's only task of a kind, empty if it has none."""
    return next((task.metrics for task in tasks if task.kind == kind and task.metrics), {})


def _features(tasks: Sequence[TaskRow]) -> tuple[FeatureRow, ...]:
    """Return the temporal features in the order of execution, from the metrics of `temporal`."""
    rows = []
    for name, found in _metrics(tasks, "temporal").get("features", {}).items():
        end = "_table" if "sqnr_db_table" in found else ""
        rows.append(
            FeatureRow(name, found["served"], found["sqnr_db_start"], found[f"sqnr_db{end}"], found[f"cosine{end}"])
        )
    return tuple(rows)


def _correction(step: Mapping[str, Any]) -> CorrectionRow:
    """Return one step of the metrics of `correct`."""
    before, after = step["mse_before"], step["mse_after"]
    gain = 10 * math.log10(before / after) if before > 0 and after > 0 else 0.0
    return CorrectionRow(step["k"], step["r2"], step["uses_k"], step["uses_bias"], gain)


def _plain(value: Any) -> str:
    """Return a JSON value for a person: mappings as "key: value; key: value", lists with commas."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name.replace('_', ' ')}: {_plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)
