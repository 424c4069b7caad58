"""Every statement that the rest of Quantmill makes, one function each, by name."""

from __future__ import annotations

from orchestrator.db.enqueue import enqueue_graph
from orchestrator.db.jobs import (
    cancel_job,
    create_job,
    events,
    find_job,
    find_task,
    job_counts,
    job_kinds,
    list_jobs,
    list_tasks,
    nothing_left,
    retry_job,
    work_left,
)
from orchestrator.db.queue import (
    check_end,
    claim_tasks,
    fail_task,
    finish_task,
    finish_tasks,
    reap_expired,
    release_task,
    release_tasks,
    renew_leases,
)
from orchestrator.db.references import references
from orchestrator.db.registry import add_model, find_model, known_results, list_models
from orchestrator.db.releases import find_release, list_releases, set_alias
from orchestrator.db.stopped import note_stopped
from orchestrator.db.timings import kind_timings

__all__ = [
    "add_model",
    "find_model",
    "list_models",
    "create_job",
    "enqueue_graph",
    "cancel_job",
    "retry_job",
    "find_job",
    "list_jobs",
    "job_counts",
    "job_kinds",
    "list_tasks",
    "find_task",
    "events",
    "work_left",
    "nothing_left",
    "check_end",
    "claim_tasks",
    "renew_leases",
    "finish_task",
    "finish_tasks",
    "fail_task",
    "release_task",
    "release_tasks",
    "reap_expired",
    "note_stopped",
    "known_results",
    "kind_timings",
    "list_releases",
    "find_release",
    "set_alias",
    "references",
]
