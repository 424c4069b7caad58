"""Looking at jobs: one now, one until it ends, and what happened to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.actions.cluster import left_out
from orchestrator.actions.patience import patiently
from orchestrator.actions.views import event_view, job_view
from orchestrator.db.clock import database_time
from orchestrator.db.jobs import events, find_job, is_invalid, job_counts, list_jobs, list_tasks
from orchestrator.db.orchestrators import clusters
from orchestrator.db.places import task_places
from orchestrator.db.rows import EventRow, JobRow, TaskRow
from orchestrator.db.waiting import job_waiting
from orchestrator.scheduling.running import REPORTING, RunningTask, running_tasks
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState, TaskState
from workers.errors import StoreError
from workers.storage.store import open_store

#: How often a job that is waited for is looked at, in seconds.
POLL_SECONDS = 0.5
_EVENTS_PER_READ = 500

#: Exit code of what has not ended within the time given, or was interrupted.
NOT_FINISHED = 101
#: Exit codes of jobs and searches that have ended.
EXIT_CODES = {JobState.SUCCEEDED: 0, JobState.FAILED: 100, JobState.CANCELLED: 103}
_INVALID_INPUT = 2


def exit_code(service: Service, job: JobRow) -> int:
    """Return what the shell is told about a job: 2 if it met bad input; of one that has not ended, 101."""
    if job.state is JobState.FAILED:
        with service.database.session(read_only=True) as session:
            if is_invalid(session, job):
                return _INVALID_INPUT
    return EXIT_CODES.get(job.state, NOT_FINISHED)


def show_job(service: Service, prefix: str) -> dict[str, Any]:
    """Return a job's view by a unique prefix of its id."""
    with service.database.session(read_only=True) as session:
        job = find_job(session, prefix)
        view = job_view(job, job_counts(session, job.id), database_time(session), job_waiting(session, job))
        rows = [task for kind in REPORTING for task in list_tasks(session, job.id, kind=kind)]
        ran = [each.document() for each in task_places(session, job.id)]
        at_work = clusters(session) if job.state in ACTIVE_JOBS else {}
    steps = running_steps(service, rows)
    return view | {
        "steps": [each.document() for each in steps],
        "ran": ran,
        "left_out": left_out(at_work.values()),
    }


def running_steps(service: Service, rows: list[TaskRow]) -> tuple[RunningTask, ...]:
    """Return how far long tasks are; nothing while the store is out, which is where they note it."""
    if not any(row.state is TaskState.RUNNING for row in rows):
        return ()
    try:
        return running_tasks(rows, open_store(service.settings.store_url, quick=True))
    except StoreError:
        return ()


def show_jobs(service: Service, *, state: JobState | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """Return the views of the newest jobs, newest first."""
    with service.database.session(read_only=True) as session:
        now = database_time(session)
        rows = list_jobs(session, states=[state] if state else [], limit=limit)
        return [job_view(job, job_counts(session, job.id), now, job_waiting(session, job)) for job in rows]


def wait_for_job(
    service: Service, prefix: str, timeout_seconds: float | None = None, notify: Callable[[str], None] = lambda _: None
) -> JobRow:
    """Return a job once it has ended, or as it is when the time is over; a database that is out is waited for.

    Parameters
    ----------
    service
        Where it is queued; something else must execute it.
    prefix
        Of its id.
    timeout_seconds
        None waits for ever.
    notify
        Told what the job waits for, whenever that changes.

    Raises
    ------
    DatabaseUnavailableError
        If the database is out for longer than a command's patience, or when the time is over.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    told: str | None = None

    def look() -> tuple[JobRow, str | None]:
        with service.database.session(read_only=True) as session:
            job = find_job(session, prefix)
            return job, job_waiting(session, job)

    while True:
        job, reason = patiently(look, notify, deadline)
        if reason != told and job.state in ACTIVE_JOBS:
            notify(f"job {job.id}: " + (f"waiting for the {reason}" if reason else "goes on"))
            told = reason
        left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
        if job.state not in ACTIVE_JOBS or left <= 0:
            return job
        time.sleep(min(POLL_SECONDS, left))


def job_events(service: Service, prefix: str, *, follow: bool) -> Iterator[dict[str, Any]]:
    """Yield what happened to a job and its tasks, oldest first, as JSON; with `follow`, until the job has ended."""
    seen = 0
    tasks: dict[str, tuple[str, str]] | None = None

    def look() -> tuple[JobRow, list[EventRow], dict[str, tuple[str, str]] | None]:
        with service.database.session(read_only=True) as session:
            job = find_job(session, prefix)
            rows = events(session, job.id, after_id=seen, limit=_EVENTS_PER_READ)
            if rows and tasks is None:
                # A job has all its tasks from the transaction that made it.
                return job, rows, {task.id: (task.kind, task.label) for task in list_tasks(session, job.id)}
            return job, rows, tasks

    while True:
        job, rows, tasks = patiently(look)
        for row in rows:
            kind, label = (tasks or {}).get(row.task or "", (None, None))
            yield event_view(row, kind, label)
        if rows:
            seen = rows[-1].id
        elif not follow or job.state not in ACTIVE_JOBS:
            return
        else:
            time.sleep(POLL_SECONDS)
