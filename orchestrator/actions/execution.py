"""Running jobs here: one with its progress on the screen, or whatever is queued."""

from __future__ import annotations

import threading
import time
from functools import partial

from orchestrator.actions.dry_run import worker_count
from orchestrator.actions.patience import patiently
from orchestrator.actions.progress import show_progress
from orchestrator.db.jobs import find_job
from orchestrator.db.rows import JobRow
from orchestrator.scheduling.scheduler import Scheduler, SchedulerConfig, Served
from orchestrator.scheduling.watch import Watch
from orchestrator.search.advance import Steps
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS
from workers.execution.executor import RayExecutor
from workers.storage.store import open_store


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
        service.database.patience.stop = stop
        # A store that is out must not keep the progress, and with it the end, waiting.
        notes = open_store(service.settings.store_url, quick=True)
        scheduler = make_scheduler(service)
        with show_progress(service.database, notes, job.id, workers=worker_count(), cluster=scheduler.cluster):
            scheduler.run(stop=stop, until_job=job.id)

    def look() -> JobRow:
        with service.database.session(read_only=True) as session:
            return find_job(session, job.id)

    return patiently(look, deadline=time.monotonic() if stop.is_set() else None)


def serve(service: Service, stop: threading.Event, *, drain: bool, watch: Watch | None = None) -> Served:
    """Execute whatever is queued until `stop` is set or, with `drain`, until nothing is left; return what was done.

    `watch` is told what happens.
    """
    service.database.patience.stop = stop
    return make_scheduler(service, watch).run(stop=stop, drain=drain)


def make_scheduler(service: Service, watch: Watch | None = None) -> Scheduler:
    """Return a scheduler on the service's database, store and Ray."""
    settings = service.settings
    config = SchedulerConfig(settings.store_url, settings.cache_dir, settings.cache_bytes)
    start = partial(RayExecutor.start, settings.ray_address)
    return Scheduler(service.database, start, config, watch, Steps(service.impatient()))
