"""The state machines: every pair of state and event."""

from __future__ import annotations

from orchestrator.states import (
    ACTIVE_JOBS,
    JOB_TRANSITIONS,
    TASK_TRANSITIONS,
    UNFINISHED_TASKS,
    JobEvent,
    JobState,
    TaskEvent,
    TaskState,
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
    ("succeeded", "repaired"): "blocked",
    ("queued", "waiting"): "blocked",
    ("running", "waiting"): "blocked",
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


def test_events_lead_where_they_are_listed_to_and_apply_nowhere_else() -> None:
    for transitions, listed in ((TASK_TRANSITIONS, TASKS), (JOB_TRANSITIONS, JOBS)):
        found = {
            (source.value, event.value): transition.target.value
            for event, transition in transitions.items()
            for source in transition.sources
        }
        assert found == listed


def test_every_event_has_a_transition() -> None:
    assert set(TASK_TRANSITIONS) == set(TaskEvent)
    assert set(JOB_TRANSITIONS) == set(JobEvent)


def test_success_lasts_until_the_bytes_are_lost() -> None:
    ending = {event for event, transition in TASK_TRANSITIONS.items() if TaskState.SUCCEEDED in transition.sources}
    assert ending == {TaskEvent.REPAIR}
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
