"""The state machines: every pair of state and event."""

from __future__ import annotations

import pytest

from orchestrator.errors import IllegalTransitionError
from orchestrator.states import (
    ACTIVE_JOBS,
    JOB_TRANSITIONS,
    TASK_TRANSITIONS,
    UNFINISHED_TASKS,
    JobEvent,
    JobState,
    TaskEvent,
    TaskState,
    next_job_state,
    next_task_state,
)

TASKS = {
    ("blocked", "promoted"): "queued",
    ("blocked", "cached"): "succeeded",
    ("blocked", "failed"): "failed",
    ("blocked", "cancelled"): "cancelled",
    ("queued", "cached"): "succeeded",
    ("queued", "claimed"): "running",
    ("queued", "cancelled"): "cancelled",
    ("running", "finished"): "succeeded",
    ("running", "retried"): "queued",
    ("running", "released"): "queued",
    ("running", "expired"): "queued",
    ("running", "failed"): "failed",
    ("running", "cancelled"): "cancelled",
    ("failed", "revived"): "blocked",
    ("cancelled", "revived"): "blocked",
}

JOBS = {
    ("queued", "started"): "running",
    ("queued", "succeeded"): "succeeded",
    ("queued", "failed"): "failed",
    ("queued", "cancelled"): "cancelled",
    ("running", "succeeded"): "succeeded",
    ("running", "failed"): "failed",
    ("running", "cancelled"): "cancelled",
    ("failed", "retried"): "queued",
    ("cancelled", "retried"): "queued",
}


@pytest.mark.parametrize("event", list(TaskEvent))
@pytest.mark.parametrize("state", list(TaskState))
def test_next_task_state_is_as_listed_or_refused(state: TaskState, event: TaskEvent) -> None:
    expected = TASKS.get((state.value, event.value))
    if expected is None:
        with pytest.raises(IllegalTransitionError, match=f"event '{event.value}': got state '{state.value}', wanted"):
            next_task_state(state, event)
    else:
        assert next_task_state(state, event) == expected


@pytest.mark.parametrize("event", list(JobEvent))
@pytest.mark.parametrize("state", list(JobState))
def test_next_job_state_is_as_listed_or_refused(state: JobState, event: JobEvent) -> None:
    expected = JOBS.get((state.value, event.value))
    if expected is None:
        with pytest.raises(IllegalTransitionError, match=f"event '{event.value}': got state '{state.value}', wanted"):
            next_job_state(state, event)
    else:
        assert next_job_state(state, event) == expected


def test_every_event_has_a_transition() -> None:
    assert set(TASK_TRANSITIONS) == set(TaskEvent)
    assert set(JOB_TRANSITIONS) == set(JobEvent)


def test_success_is_for_ever() -> None:
    assert not any(TaskState.SUCCEEDED in transition.sources for transition in TASK_TRANSITIONS.values())
    assert not any(JobState.SUCCEEDED in transition.sources for transition in JOB_TRANSITIONS.values())


def test_every_unfinished_state_has_a_way_to_success_and_to_the_end() -> None:
    for start in UNFINISHED_TASKS:
        reached, fresh = set(), {start}
        while fresh:
            reached |= fresh
            fresh = {edge.target for edge in TASK_TRANSITIONS.values() if edge.sources & reached} - reached
        assert {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED} <= reached
    for event in (JobEvent.SUCCEED, JobEvent.FAIL, JobEvent.CANCEL):
        assert JOB_TRANSITIONS[event].sources == ACTIVE_JOBS
