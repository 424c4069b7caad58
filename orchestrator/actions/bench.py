"""Measuring a release on the device at hand, against its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from orchestrator.actions.dry_run import worker_count
from orchestrator.actions.local import run_task
from orchestrator.actions.lost_bytes import sending_to_repair
from orchestrator.db.jobs import find_job
from orchestrator.db.releases import find_release, publish
from orchestrator.db.session import lock_graph
from orchestrator.service import Service
from quant_spec.enums import KernelBackend
from quant_spec.record import Bits
from quant_spec.sampler import Sampler
from quant_spec.tasks import bench, card, layer_times

#: Bits of weights and inputs in which single layers are timed, and for how long each at least, in seconds.
WEIGHT_BITS: tuple[Bits, ...] = get_args(Bits)
ACTIVATION_BITS: tuple[Bits, ...] = (4, 6, 8)
LAYER_SECONDS = 0.5
#: Batch sizes whose step is timed, and for how long each at least, in seconds.
BATCHES, SECONDS = (1, 8), 1.0


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure: torch's name of the device, CPU threads (None: all that this process may use), the release's
    backend, and whether the compiled original is measured too.
    """

    device: str = "cpu"
    threads: int | None = None
    backend: KernelBackend = KernelBackend.AUTO
    compiled: bool = True


def bench_release(
    service: Service, ref: str, options: BenchOptions, *, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a release and its full-precision original in one process.

    Parameters
    ----------
    service
        Knows the release and holds both models' bytes.
    ref
        name@3, name@alias, name, or a digest's beginning.
    options
        Where and how.
    notify
        Called with a line for a person before it starts.

    Returns
    -------
    dict
        `release`, `digest`, `device`, `threads`, `dtype` (of the release, between its layers), `backend`, `layers`
        (backend to number of layers), `way` ("eager" or, on a GPU, "CUDA graph"), `graph_error` (why there is no graph
        on a GPU, or null), `compiled_way` ("whole" or, on a GPU, "by block"; null if not measured), `compile_error`
        (why the compiled original was not measured, or null); for each of `BENCHED` `step_ms` by batch size,
        `eager_step_ms` (the same called as it is, where `way` is another one), `images_per_second`,
        `peak_memory_bytes`, `bytes`, or null if not measured; `ratios`: original to release of times and sizes, release
        to original of images per second, so that above 1 the release is better; `ratios_bf16`, `ratios_bf16_compiled`:
        the same to those.
    """
    with service.database.session(read_only=True) as session:
        release = find_release(session, ref)
        job = find_job(session, release.job)
    notify(f"measuring {release.ref} and its original on {options.device}")
    with sending_to_repair(service, release):
        metrics = run_task(
            service.settings,
            bench.KIND,
            bench.Params(
                sampler=Sampler.from_json(release.metrics["sampler"]),
                batches=BATCHES,
                seconds=SECONDS,
                backend=options.backend,
                compile=options.compiled,
            ),
            bench.Inputs(artifact=release.digest, model=job.model_digest),
            device=options.device,
            threads=options.threads or worker_count(),
        ).metrics
    if metrics["compile_error"] is not None:
        notify(f"the compiled original was not measured: {metrics['compile_error']}")
    if metrics["graph_error"] is not None:
        notify(f"steps are called as they are, not from CUDA graphs: {metrics['graph_error']}")
    ours, original, half, compiled = (metrics[side] for side in bench.BENCHED.values())
    how = ("way", "graph_error", "compiled_way", "compile_error")
    copied = ("device", "threads", "dtype", "backend", "layers", *how)
    return {
        "release": release.ref,
        "digest": release.digest,
        **{name: metrics[name] for name in (*copied, *bench.BENCHED.values())},
        "ratios": _ratios(ours, original),
        "ratios_bf16": _ratios(ours, half),
        "ratios_bf16_compiled": None if compiled is None else _ratios(ours, compiled),
    }


def bench_layers(service: Service, ref: str, options: BenchOptions, *, notify: Callable[[str], None]) -> dict[str, Any]:
    """Time each layer of a release's model in each format, as a search's `latency_table` has it.

    Returns
    -------
    dict
        `release`, `device`, `threads`, `backend`; `layers`, {layer: {"4/8": milliseconds, …, "float/float": …}} by bits
        of weights and inputs; `rest_ms`, what of a denoiser call no layer takes.
    """
    with service.database.session(read_only=True) as session:
        release = find_release(session, ref)
        job = find_job(session, release.job)
    notify(f"timing the layers of {release.ref} on {options.device}")
    with sending_to_repair(service, release):
        metrics = run_task(
            service.settings,
            layer_times.KIND,
            layer_times.Params(
                sampler=Sampler.from_json(release.metrics["sampler"]),
                weight_bits=WEIGHT_BITS,
                activation_bits=ACTIVATION_BITS,
                seconds=LAYER_SECONDS,
                backend=options.backend,
            ),
            layer_times.Inputs(artifact=release.digest, model=job.model_digest),
            device=options.device,
            threads=options.threads or worker_count(),
        ).metrics
    return {"release": release.ref, **metrics}


def publish_bench(service: Service, found: dict[str, Any]) -> str:
    """Publish the measured release's next version, with the measurement in its model card; return "name@N".

    Its tensors and metrics are the same; a release's own card never changes, since its digest names it.
    """
    with service.database.session(read_only=True) as session:
        release = find_release(session, found["release"])
    output = run_task(service.settings, card.KIND, card.Params(bench=found), card.Inputs(artifact=release.digest))
    digest, size = output.outputs[card.ARTIFACT], output.metrics["artifact_bytes"]
    with service.database.session() as session:
        lock_graph(session)
        return publish(session, release.name, digest, size, job=release.job, metrics=release.metrics)


def _ratios(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return how much better the release is, by figure."""
    peak = other["peak_memory_bytes"]
    return {
        "step_ms": {batch: other["step_ms"][batch] / ours["step_ms"][batch] for batch in ours["step_ms"]},
        "images_per_second": ours["images_per_second"] / other["images_per_second"],
        "peak_memory_bytes": None if peak is None else peak / ours["peak_memory_bytes"],
        "bytes": other["bytes"] / ours["bytes"],
    }
