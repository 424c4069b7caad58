"""What a schedule led to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.faults.checker import bodies_exclusive, figures, violations
from tests.faults.schedule import Schedule
from tests.faults.service import Service


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule led to; `violations` by check, empty if all held."""

    schedule: Schedule
    backend: str
    seconds: float
    violations: dict[str, list[str]]
    figures: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return it as JSON; the steps of the schedule only if something was violated."""
        about = {"backend": self.backend, "seconds": round(self.seconds, 2), "figures": self.figures}
        if not self.violations:
            return {"seed": self.schedule.seed, **about}
        return {**self.schedule.document(), **about, "violations": self.violations, "notes": self.notes}


def settle(service: Service) -> None:
    """Wait until all jobs have ended, retry those that failed while things were wrong, and wait for these too."""
    if service.wait_for_jobs() and service.retry_failed():
        service.wait_for_jobs()


def judge(service: Service, schedule: Schedule, having: frozenset[str]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return what was violated, and how much happened, once all has come to its end.

    With "handover", no body may have run beside another of the same key whose holder still answered. With "outages",
    no job may have failed if outages are all that happened. What tasks waited for was counted anew again and again
    meanwhile: "counts_right" has those that had it wrong, "rows_accepted" what the database refused.
    """
    history = service.history()
    found = violations(history)
    if "outages" in having:
        found.pop("renewals_in_time", None)
    at_once = list(bodies_exclusive(history))
    if at_once and "handover" in having:
        found["bodies_exclusive"] = at_once
    if failed := service.recorder.query("SELECT id, error FROM jobs WHERE state = 'failed'"):
        found.setdefault("nothing_lost", []).append(f"jobs failed when nothing was wrong any more: {failed}")
    failed_meanwhile = [change for change in history.of("jobs") if change.enters("failed")]
    if failed_meanwhile and "outages" in having and all(step.fault.only_waits for step in schedule.steps):
        found["outages_wait"] = [f"job {each.row['id']}: failed ({each.row['error']})" for each in failed_meanwhile]
    if service.miscounts:
        found["counts_right"] = sorted(service.miscounts)
    if service.refusals:
        found["rows_accepted"] = service.refusals
    if crashes := service.crashes():
        found["schedulers_live"] = crashes
    counts = figures(history) | {"jobs_failed_meanwhile": len(failed_meanwhile), "bodies_at_once": len(at_once)}
    return found, counts
