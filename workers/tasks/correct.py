"""Correct: fit PTQD's correction to the noise of a packed model, and pack it with a sampler that applies it.

All but the scheduler's file is the packed tree's. Metrics: `steps`, for each timestep, k, r2, uses_k, uses_bias, and
the held-out error before and after; `mse_before`, `mse_after`, the means of these errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quant_core.artifact.folder import SCHEDULER_FILE, scheduler_json
from quant_core.diffusion.corrected_scheduler import QuantmillCorrectedScheduler
from quant_core.diffusion.sampler import make_scheduler
from quant_core.methods.ptqd.correction import NoiseMoments, fit, merge
from quant_spec.documents import read_json
from quant_spec.sampler import Sampler
from quant_spec.tasks.correct import PACKED, Inputs, Params
from workers.errors import TaskError
from workers.execution.context import TaskContext, TaskOutput
from workers.storage.manifest import put_manifest, read_files
from workers.storage.store import Store

_DIGITS = 9


def run(params: Params, inputs: Inputs[str], context: TaskContext) -> TaskOutput:
    """Fit and pack one correction."""
    store = context.store
    files = read_files(store, inputs.packed)
    if SCHEDULER_FILE not in files:
        raise TaskError(f"packed tree: got {', '.join(sorted(files))}, wanted a {SCHEDULER_FILE} among them")
    noise, held_out = _moments(inputs.noise, store), _moments(inputs.held_out, store)
    fitted = fit(noise, held_out, params, channel_dim=params.channel_dim)
    wrapped = make_scheduler(Sampler(), read_json(store.get_bytes(files[SCHEDULER_FILE][0]), SCHEDULER_FILE))
    scheduler = QuantmillCorrectedScheduler(wrapped, fitted.correction, params.unknown_timestep)
    data = scheduler_json(scheduler)
    files[SCHEDULER_FILE] = (store.put_bytes(data), len(data))
    steps = [_rounded(asdict(step)) for step in fitted.report]
    means = {name: sum(step[name] for step in steps) / len(steps) for name in ("mse_before", "mse_after")}
    return TaskOutput({PACKED: put_manifest(store, files)}, {"steps": steps, **_rounded(means)})


def _moments(digests: Sequence[str], store: Store) -> NoiseMoments:
    return merge([NoiseMoments.from_json(read_json(store.get_bytes(digest), digest[:12])) for digest in digests])


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for key, value in values.items()}
