"""Correct: fit PTQD's correction to the noise of a packed model, and pack it with a sampler that applies it.

params
    scale, bias, variance, least_r2, held_out: see `quant_core.methods.ptqd.correction.PTQDConfig`; unknown_timestep:
    "error" or "nearest"; channel_dim: of the predictions
inputs
    packed: tree; noise: shards of moments to fit; held_out: shards of other seeds, which decide what is used
outputs
    packed: the tree with the corrected scheduler
metrics
    steps: for each, timestep, k, r2, uses_k, uses_bias, and the held-out error before and after
    mse_before, mse_after: means of these
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from quant_core.artifact.folder import SCHEDULER_FILE, scheduler_json
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusion.sampler import SamplerSpec, make_scheduler
from quant_core.methods.ptqd.correction import NoiseMoments, PTQDConfig, fit, merge
from workers.errors import TaskError
from workers.execution.context import Inputs, Params, TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_manifest
from workers.storage.store import Store
from workers.tasks.common import only

_DIGITS = 9
_PARTS = ("scale", "bias", "variance", "least_r2", "held_out")


def run(params: Params, inputs: Inputs, context: TaskContext) -> TaskOutput:
    """Fit and pack one correction."""
    store = context.store
    files = {
        path: (entry["sha256"], entry["bytes"])
        for path, entry in read_manifest(store, only(inputs, "packed"))["files"].items()
    }
    if SCHEDULER_FILE not in files:
        raise TaskError(f"packed tree: got {', '.join(sorted(files))}, wanted a {SCHEDULER_FILE} among them")
    config = PTQDConfig(**{name: params[name] for name in _PARTS})
    fitted = fit(
        _moments(inputs["noise"], store), _moments(inputs["held_out"], store), config, channel_dim=params["channel_dim"]
    )
    wrapped = make_scheduler(SamplerSpec(), json.loads(store.get_bytes(files[SCHEDULER_FILE][0])))
    scheduler = QuantmillCorrectedScheduler(wrapped, fitted.correction, params["unknown_timestep"])
    data = scheduler_json(scheduler)
    files[SCHEDULER_FILE] = (store.put_bytes(data), len(data))
    steps = [_rounded(asdict(step)) for step in fitted.report]
    means = {name: sum(step[name] for step in steps) / len(steps) for name in ("mse_before", "mse_after")}
    return TaskOutput({"packed": put_manifest(store, files)}, {"steps": steps, **_rounded(means)})


def _moments(digests: list[str], store: Store) -> NoiseMoments:
    return merge([NoiseMoments.from_json(json.loads(store.get_bytes(digest))) for digest in digests])


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for key, value in values.items()}
