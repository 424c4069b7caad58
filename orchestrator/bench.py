"""Measuring a release on the device at hand, against its original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.db.jobs import find_job
from orchestrator.db.releases import find_release
from orchestrator.dryrun import worker_count
from orchestrator.local import run_task
from orchestrator.service import Service

_SIDES = ("release_figures", "original_figures")
#: Batch sizes whose step is timed, and for how long each at least, in seconds.
BATCHES, SECONDS = (1, 8), 1.0


def bench_release(
    service: Service, ref: str, *, device: str, threads: int | None, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a release and its full-precision original in one process.

    Parameters
    ----------
    service
        Knows the release and holds both models' bytes.
    ref
        name@3, name@alias, name, or a digest's beginning.
    device
        Torch's name of the device.
    threads
        CPU threads; None for all that this process may use.
    tell
        Called with a line for a person before it starts.

    Returns
    -------
    dict
        `release`, `digest`, `device`, `threads`, `backend`; `release_figures` and `original_figures` with `step_ms` by
        batch size, `images_per_second`, `peak_memory_bytes`, `bytes`; `ratios`: original to release of times and sizes,
        release to original of images per second, so that above 1 the release is better.
    """
    with service.database.session(read_only=True) as session:
        release = find_release(session, ref)
        job = find_job(session, release.job)
    tell(f"measuring {release.ref} and its original on {device}")
    metrics = run_task(
        service.settings,
        "bench",
        {"sampler": job.recipe["sampler"], "batches": list(BATCHES), "seconds": SECONDS},
        {"artifact": [release.digest], "model": [job.model_digest]},
        device=device,
        threads=threads or worker_count(),
    ).metrics
    ours, original = (metrics[side] for side in _SIDES)
    return {
        "release": release.ref,
        "digest": release.digest,
        **{name: metrics[name] for name in ("device", "threads", "backend", *_SIDES)},
        "ratios": {
            "step_ms": {batch: original["step_ms"][batch] / ours["step_ms"][batch] for batch in ours["step_ms"]},
            "images_per_second": ours["images_per_second"] / original["images_per_second"],
            "peak_memory_bytes": original["peak_memory_bytes"] / ours["peak_memory_bytes"],
            "bytes": original["bytes"] / ours["bytes"],
        },
    }
