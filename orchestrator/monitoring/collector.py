"""What is looked up when Prometheus asks: the database, the scheduler's status, the last listing of the store."""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from importlib import metadata

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from orchestrator.db.monitoring import Overview, overview
from orchestrator.db.session import Database
from orchestrator.errors import DatabaseError
from orchestrator.monitoring.metrics import METRICS, Type
from orchestrator.monitoring.store_size import StoreSize
from orchestrator.scheduling.watch import SchedulerStatus, Watch

log = logging.getLogger(__name__)

#: Labels' values, in the metric's order, and a number.
Sample = tuple[tuple[str, ...], float]

# An answer of the database is used again for so many times the time that it took: scrapes take a tenth of it at most.
_REUSE = 9.0


class ServiceCollector(Collector):
    """Looks at a service and one of its orchestrators; safe to ask from several threads."""

    def __init__(self, database: Database, watch: Watch, store: StoreSize, orchestrator: str) -> None:
        """Look at these; `orchestrator` is the name that leases have as their owner."""
        self._database, self._watch, self._store, self._orchestrator = database, watch, store, orchestrator
        self._lock = threading.Lock()
        self._kept: tuple[float, Overview] | None = None

    def collect(self) -> Iterable[Family]:
        """Return every family that is not counted as it happens."""
        labels = (metadata.version("quantmill"), platform.python_version(), self._orchestrator)
        yield _family("quantmill_build_info", [(labels, 1.0)])
        found = self._overview()
        yield _family("quantmill_database_up", [((), float(found is not None))])
        if found is not None:
            yield from _of_service(found)
        yield from _of_scheduler(self._watch.status)
        listing = self._store.listing
        if listing is not None:
            yield _family("quantmill_store_bytes", [((), listing.bytes)])
            yield _family("quantmill_store_blobs", [((), listing.blobs)])
            yield _family("quantmill_store_listing_age_seconds", [((), time.monotonic() - listing.at)])

    def describe(self) -> Iterable[Family]:
        """Return no family: registering asks nothing of the database."""
        return []

    def _overview(self) -> Overview | None:
        """Ask the database, or return its last answer if that is young for what it cost; None if it is out."""
        with self._lock:
            now = time.monotonic()
            if self._kept is not None and now < self._kept[0]:
                return self._kept[1]
            try:
                with self._database.session(read_only=True) as session:
                    found = overview(session)
            except DatabaseError as error:
                log.warning("metrics without what the database knows: %s", error)
                self._kept = None
                return None
            self._kept = (time.monotonic() + _REUSE * (time.monotonic() - now), found)
            return found


def _of_service(found: Overview) -> Iterator[Family]:
    yield _family("quantmill_tasks", [((each.state, each.kind), each.tasks) for each in found.depths])
    yield _family("quantmill_oldest_ready_task_seconds", [((), found.oldest_ready_seconds)])
    yield _family("quantmill_jobs", [((state,), n) for state, n in found.jobs.items()])
    yield _family("quantmill_orchestrators", [((state,), n) for state, n in found.orchestrators.items()])
    yield _family("quantmill_results_total", [((each.kind, each.device), each.results) for each in found.totals])
    yield _family(
        "quantmill_results_seconds_total", [((each.kind, each.device), each.seconds) for each in found.totals]
    )


def _of_scheduler(status: SchedulerStatus) -> Iterator[Family]:
    numbers: dict[str, float] = {
        "quantmill_tasks_in_flight": status.in_flight,
        "quantmill_claimed_cpus": status.claimed.cpus,
        "quantmill_claimed_gpus": status.claimed.gpus,
        "quantmill_claimed_memory_bytes": status.claimed.memory_bytes,
        "quantmill_waiting": bool(status.waiting_for),
        "quantmill_loop_silent_seconds": status.silent_seconds,
    }
    if status.capacity is not None:
        numbers |= {
            "quantmill_cluster_cpus": status.capacity.cpus,
            "quantmill_cluster_gpus": status.capacity.gpus,
            "quantmill_cluster_memory_bytes": status.capacity.memory_bytes,
        }
    for name, number in numbers.items():
        yield _family(name, [((), number)])


def _family(name: str, samples: Iterable[Sample]) -> Family:
    """Return a metric of the table with its samples."""
    metric = METRICS[name]
    kind = CounterMetricFamily if metric.type is Type.COUNTER else GaugeMetricFamily
    family = kind(metric.family, metric.meaning, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family
