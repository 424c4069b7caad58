"""Jobs that the command line submitted, brought to their end as workers would, with results that a test chooses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.db.queue import claim_tasks, finish_task
from orchestrator.db.rows import ClaimedTask
from orchestrator.db.session import open_database
from quant_spec.formats import ModelFormat
from quant_spec.quantization_config import quantization_config
from workers.storage.manifest import put_tree
from workers.storage.store import open_store

METRICS: dict[str, Any] = {
    "psnr_db": 33.25,
    "psnr_db_ci95": 0.5,
    "fd": 0.0421,
    "fd_extractor": "efficientnet-lite0-imagenet@224",
    "n": 8,
    "weight_bits_mean": 4.25,
    "act_bits_mean": 8.0,
    "bytes": 2_500_000,
    "bytes_fp16": 8_640_000,
    "bops": 1e12,
    "bops_fp32": 3.2e13,
    "sqnr_db_per_step": [30.0, 28.5, 27.0],
    "timesteps": [666, 333, 0],
    "sampler": {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "eta": 0.0, "guidance_scale": 1.0},
    "seeds": {"first": 0, "count": 8},
    "sqnr_seeds": 4,
}
_OUTPUTS = {
    "calibrate": "calibration",
    "pack": "packed",
    "reference": "reference",
    "evaluate": "evaluation",
    "score": "score",
}


def put_release(home: Path, model_format: ModelFormat, recipe: Mapping[str, Any]) -> str:
    """Store a release's tree without weights; return its digest."""
    config = {"_class_name": "UNet2DModel", "quantization_config": quantization_config(model_format)}
    with TemporaryDirectory() as folder:
        for name, content in {"config": config, "recipe": recipe, "provenance": {}}.items():
            Path(folder, f"{name}.json").write_text(json.dumps(content))
        Path(folder, "weights.safetensors").write_bytes(b"none")
        return put_tree(open_store(str(home / "store")), Path(folder))


def finish_job(home: Path, artifact: str, metrics: Mapping[str, Any], sqnr_db: float = 30.0) -> None:
    """End all tasks that are queued: the release gets that artifact and metrics, each rounded layer that SQNR."""
    database = open_database(f"sqlite:///{home / 'quantmill.db'}")
    try:
        while True:
            with database.session() as session:
                claimed = claim_tasks(session, owner="test", limit=100, lease_seconds=60)
            if not claimed:
                return
            for task in claimed:
                outputs, recorded = _result(task, artifact, metrics, sqnr_db)
                with database.session() as session:
                    assert finish_task(session, task.lease, outputs, recorded, 1.0)
    finally:
        database.close()


def _result(
    task: ClaimedTask, artifact: str, metrics: Mapping[str, Any], sqnr_db: float
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return outputs and metrics of one task."""
    blob = hashlib.sha256(task.lease.task_id.encode()).hexdigest()
    if task.kind == "round":
        units = task.params["units"]
        layers = {name: {"sqnr_db": sqnr_db} for unit in units for name in unit["layers"]}
        return {f"state:{unit['unit']}": blob for unit in units}, {"layers": layers}
    if task.kind == "release":
        return {"artifact": artifact}, {"artifact_bytes": 1234, "metrics": dict(metrics)}
    return {_OUTPUTS[task.kind]: blob}, {"metrics": dict(metrics)} if task.kind == "score" else {}
