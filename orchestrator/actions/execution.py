"""Running jobs here: one with its progress on the screen, or whatever is queued."""

from __future__ import annotations

import threading
from functools import partial

from orchestrator.actions.dry_run import worker_count
from orchestrator.actions.progress import Progress
from orchestrator.db.jobs import find_job
from orchestrator.db.rows import JobRow
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig, Served
from orchestrator.scheduling.watch import Watch
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS
from workers.execution.executor import RayExecutor


def run_job(service: Service, job: JobRow, stop: threading.Event) -> JobRow:
    """Execute a job here to its end, or until `stop` is set, showing its progress on stderr.

    Other jobs that are queued run as well where they come first. A job that has ended already starts nothing, Ray
    included.

    Returns
    -------
    JobRow
        The job as it is now; if it has not ended, any orchestrator goes on with it.
    """
    if job.state in ACTIVE_JOBS:
        with Progress(service.database, service.store, job.id, workers=worker_count()):
            make_scheduler(service).run(stop=stop, until_job=job.id)
    with service.database.session(read_only=True) as session:
        return find_job(session, job.id)


def serve(service: Service, stop: threading.Event, *, drain: bool, watch: Watch | None = None) -> Served:
    """Execute whatever is queued until `stop` is set or, with `drain`, until nothing is left; return what was done.

    `watch` is told what happens.
    """
    return make_scheduler(service, watch).run(stop=stop, drain=drain)


def make_scheduler(service: Service, watch: Watch | None = None) -> Scheduler:
    """Return a scheduler on the service's database, store and Ray."""
    settings = service.settings
    config = SchedulerConfig(settings.store_url, settings.cache_dir, settings.cache_bytes)
    return Scheduler(service.database, partial(RayExecutor.start, settings.ray_address), config, watch)
