"""Every metric of `quantmill serve --metrics`: name, labels, meaning; code, handbook and alerts go by this table.

`python -m orchestrator.monitoring.metrics docs/monitoring.md` writes the handbook's table anew.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from quant_spec.generated_table import rewrite


class Scope(StrEnum):
    """What a metric is about: of the service, every orchestrator of a database reports the same."""

    SERVICE = "service"
    ORCHESTRATOR = "orchestrator"


class Type(StrEnum):
    """Prometheus' types."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` is as in a query; `meaning` is one sentence without its full stop."""

    name: str
    type: Type
    scope: Scope
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The name without the suffix that Prometheus' format adds to counters."""
        return self.name.removesuffix("_total") if self.type is Type.COUNTER else self.name


_G, _C, _H = Type.GAUGE, Type.COUNTER, Type.HISTOGRAM
_S, _O = Scope.SERVICE, Scope.ORCHESTRATOR

METRICS = {
    metric.name: metric
    for metric in (
        Metric("quantmill_build_info", _G, _O, "1; the labels say what runs", ("version", "python", "orchestrator")),
        Metric("quantmill_database_up", _G, _O,
               "1 if the database answered this scrape; if not, what it would be asked is left out"),
        Metric("quantmill_tasks", _G, _S, "Tasks that are blocked, queued or running, by kind", ("state", "kind")),
        Metric("quantmill_oldest_ready_task_seconds", _G, _S,
               "How long the task that has waited longest could have been claimed; 0 if none could"),
        Metric("quantmill_jobs", _G, _S, "Jobs that have not ended", ("state",)),
        Metric("quantmill_orchestrators", _G, _S, "Orchestrators seen within a minute, working or waiting", ("state",)),
        Metric("quantmill_results_total", _C, _S, "Results computed and recorded, since the schema was made",
               ("kind", "device")),
        Metric("quantmill_results_seconds_total", _C, _S, "Seconds that computing them took", ("kind", "device")),
        Metric("quantmill_store_bytes", _G, _S,
               "Bytes of all blobs in the store, from a listing in the background: at the start, then hourly or rarer"),
        Metric("quantmill_store_blobs", _G, _S, "Blobs in the store, from the same listing"),
        Metric("quantmill_store_listing_age_seconds", _G, _O, "How old that listing is"),
        Metric("quantmill_task_seconds", _H, _O, "Seconds of the tasks that ended well here", ("kind", "device")),
        Metric("quantmill_task_faults_total", _C, _O,
               "Attempts that failed here, by fault; all but invalid ones are tried again, a few times",
               ("fault", "kind")),
        Metric("quantmill_leases_lost_total", _C, _O,
               "Tasks in flight here whose lease was lost: it ran out, or no job wanted them any more"),
        Metric("quantmill_leases_expired_total", _C, _O,
               "Tasks that this orchestrator took back since their lease had run out, whoever held it"),
        Metric("quantmill_tasks_in_flight", _G, _O, "Tasks that this orchestrator has handed to the cluster"),
        Metric("quantmill_cluster_cpus", _G, _S, "CPUs of the cluster"),
        Metric("quantmill_cluster_gpus", _G, _S, "GPUs of the cluster"),
        Metric("quantmill_cluster_memory_bytes", _G, _S, "Memory of the cluster's nodes"),
        Metric("quantmill_claimed_cpus", _G, _O, "CPUs that this orchestrator's tasks in flight take or wait for"),
        Metric("quantmill_claimed_gpus", _G, _O, "GPUs that they take or wait for"),
        Metric("quantmill_claimed_memory_bytes", _G, _O, "Memory that they take or wait for"),
        Metric("quantmill_waiting", _G, _O, "1 while this orchestrator waits for a database, store or cluster"),
        Metric("quantmill_loop_silent_seconds", _G, _O, "How long ago this orchestrator's loop last went round"),
    )
}  # fmt: skip


def reference_table() -> str:
    """Return every metric with its labels and what it means, as Markdown."""
    rows = ["| metric | type | labels | of | meaning |", "|---|---|---|---|---|"]
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        rows.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.scope} | {metric.meaning}. |")
    return "\n".join(rows)


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), reference_table())
