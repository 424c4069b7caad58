"""A watch that counts what a scheduler does, in Prometheus' own counters."""

from __future__ import annotations

from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from orchestrator.db.rows import ClaimedTask
from orchestrator.monitoring.metrics import METRICS
from orchestrator.scheduling.watch import Watch
from workers.execution.executor import Finished

#: Upper bounds of the histogram of seconds: tasks take milliseconds to hours.
BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 10800.0, 36000.0)

M = TypeVar("M", bound=MetricWrapperBase)


class CountingWatch(Watch):
    """Counts the ends of attempts and the losses of leases."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Count in `registry`."""
        super().__init__()
        seconds = METRICS["quantmill_task_seconds"]
        self._seconds = Histogram(seconds.name, seconds.meaning, seconds.labels, registry=registry, buckets=BUCKETS)
        self._faults = _counter("quantmill_task_faults_total", registry)
        self._lost = _counter("quantmill_leases_lost_total", registry)
        self._expired = _counter("quantmill_leases_expired_total", registry)

    def ended(self, task: ClaimedTask, finished: Finished) -> None:
        """Count the end of an attempt."""
        if finished.output is None:
            self._faults.labels(fault=str(finished.fault), kind=task.kind).inc()
        else:
            seconds = float(finished.output.metrics.get("seconds", 0.0))
            self._seconds.labels(kind=task.kind, device=str(finished.output.ran.get("device", "cpu"))).observe(seconds)

    def lost(self, task: ClaimedTask) -> None:
        """Count a lease that was lost."""
        self._lost.inc()

    def reaped(self, tasks: int) -> None:
        """Count leases of others that had run out."""
        self._expired.inc(tasks)


def _counter(name: str, registry: CollectorRegistry) -> Counter:
    metric = METRICS[name]
    return Counter(metric.family, metric.meaning, metric.labels, registry=registry)
