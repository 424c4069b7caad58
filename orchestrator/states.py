"""The states of jobs and tasks, and the events that move them.

Rules of this file:

* every change of state is listed here; the statements in `orchestrator.db` take their source and target states from
  these tables and nowhere else;
* an event has one target state, whatever state it starts from;
* it knows nothing of SQL, leases or time.

A task waits for its inputs (blocked), is ready (queued), is held by a lease (running), and ends succeeded, failed or
cancelled. A failed or cancelled task is revived when a job wants it again. Success lasts as long as the bytes: a task
whose outputs were lost is repaired, which is to run it again, and those that would have read them wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar


class TaskState(StrEnum):
    """State of a task."""

    BLOCKED = "blocked"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobState(StrEnum):
    """State of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class TaskEvent(StrEnum):
    """What happens to a task; the value is what the event log shows."""

    PROMOTE = "promoted"  # its last input became available
    CACHE = "cached"  # a result for its key is recorded already
    CLAIM = "claimed"  # an orchestrator took a lease on it
    FINISH = "finished"  # the lease's holder recorded its result
    RETRY = "retried"  # a fault that may pass; it runs again after a while
    RELEASE = "released"  # the lease's holder gave it back
    EXPIRE = "expired"  # the lease ran out
    FAIL = "failed"  # a fault that will not pass, or one too many
    CANCEL = "cancelled"  # no active job wants it any more
    REVIVE = "revived"  # a job wants it again
    REPAIR = "repaired"  # its outputs were lost; it runs again
    WAIT = "waiting"  # what it reads was lost; it waits until that has been made again


class JobEvent(StrEnum):
    """What happens to a job; the value is what the event log shows."""

    START = "started"  # its first task was claimed
    SUCCEED = "succeeded"  # its target task succeeded
    FAIL = "failed"  # a task that it needs failed
    CANCEL = "cancelled"  # the user cancelled it
    RETRY = "retried"  # the user asked for another try


S = TypeVar("S", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Transition(Generic[S]):
    """An event applies in the states `sources` and leads to `target`."""

    sources: frozenset[S]
    target: S


_T, _J = TaskState, JobState

TASK_TRANSITIONS: Mapping[TaskEvent, Transition[TaskState]] = {
    TaskEvent.PROMOTE: Transition(frozenset({_T.BLOCKED}), _T.QUEUED),
    TaskEvent.CACHE: Transition(frozenset({_T.BLOCKED, _T.QUEUED}), _T.SUCCEEDED),
    TaskEvent.CLAIM: Transition(frozenset({_T.QUEUED}), _T.RUNNING),
    TaskEvent.FINISH: Transition(frozenset({_T.RUNNING}), _T.SUCCEEDED),
    TaskEvent.RETRY: Transition(frozenset({_T.RUNNING}), _T.QUEUED),
    TaskEvent.RELEASE: Transition(frozenset({_T.RUNNING}), _T.QUEUED),
    TaskEvent.EXPIRE: Transition(frozenset({_T.RUNNING}), _T.QUEUED),
    TaskEvent.FAIL: Transition(frozenset({_T.BLOCKED, _T.RUNNING}), _T.FAILED),
    TaskEvent.CANCEL: Transition(frozenset({_T.BLOCKED, _T.QUEUED, _T.RUNNING}), _T.CANCELLED),
    TaskEvent.REVIVE: Transition(frozenset({_T.FAILED, _T.CANCELLED}), _T.BLOCKED),
    TaskEvent.REPAIR: Transition(frozenset({_T.SUCCEEDED}), _T.BLOCKED),
    TaskEvent.WAIT: Transition(frozenset({_T.QUEUED, _T.RUNNING}), _T.BLOCKED),
}

JOB_TRANSITIONS: Mapping[JobEvent, Transition[JobState]] = {
    JobEvent.START: Transition(frozenset({_J.QUEUED}), _J.RUNNING),
    JobEvent.SUCCEED: Transition(frozenset({_J.QUEUED, _J.RUNNING}), _J.SUCCEEDED),
    JobEvent.FAIL: Transition(frozenset({_J.QUEUED, _J.RUNNING}), _J.FAILED),
    JobEvent.CANCEL: Transition(frozenset({_J.QUEUED, _J.RUNNING}), _J.CANCELLED),
    JobEvent.RETRY: Transition(frozenset({_J.FAILED, _J.CANCELLED}), _J.QUEUED),
}

#: Jobs that still want their tasks.
ACTIVE_JOBS = frozenset({JobState.QUEUED, JobState.RUNNING})
#: Tasks that something may still happen to without a new request.
UNFINISHED_TASKS = frozenset({TaskState.BLOCKED, TaskState.QUEUED, TaskState.RUNNING})
