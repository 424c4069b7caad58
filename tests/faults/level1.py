"""The first level: one schedule on one database, with schedulers as threads; a second or two each."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.checker import bodies_exclusive, figures, violations
from tests.faults.schedule import Schedule
from tests.faults.world import World


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a schedule led to; `violations` by check, empty if all held."""

    schedule: Schedule
    backend: str
    seconds: float
    violations: dict[str, list[str]]
    figures: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return it as JSON; the steps of the schedule only if something was violated."""
        about = {"backend": self.backend, "seconds": round(self.seconds, 2), "figures": self.figures}
        if not self.violations:
            return {"seed": self.schedule.seed, **about}
        return {**self.schedule.document(), **about, "violations": self.violations}


def run(schedule: Schedule, url: str, folder: Path, having: frozenset[str] = frozenset()) -> Outcome:
    """Disturb a service as scheduled, let it come to its end, and judge what happened.

    Parameters
    ----------
    url
        A database that has the schema, is watched (`recorder.install`), and has no rows.
    folder
        An empty folder for the store.
    """
    started = time.monotonic()
    world = World(url, folder, random.Random(f"world {schedule.seed}"), schedule.schedulers)
    try:
        with world.own_clock():
            for step in schedule.steps:
                time.sleep(step.after)
                step.fault.apply(world)
            world.calm()
        ended = world.wait_for_jobs()
        world.replace_members()
        if ended and world.retry_failed():
            ended = world.wait_for_jobs()
        history = world.history()
        found = violations(history)
        if "lineage" in having and (lines := list(bodies_exclusive(history))):
            found["bodies_exclusive"] = lines
        failed = world.recorder.query("SELECT id, error FROM jobs WHERE state = 'failed'")
        if failed:
            found["nothing_lost"] = [*found.get("nothing_lost", ()), f"jobs failed when nothing was wrong: {failed}"]
        if crashes := world.crashes():
            found["schedulers_live"] = crashes
        failed_meanwhile = sum(change.enters("failed") for change in history.of("jobs"))
        counts = figures(history) | {"jobs_failed_meanwhile": failed_meanwhile}
        counts |= {"bodies_at_once": len(list(bodies_exclusive(history)))}
        counts |= {"hooks_sprung": sum(member.sprung for member in world.members)}
    finally:
        world.close()
    backend = "postgres" if world.postgres else "sqlite"
    return Outcome(schedule, backend, time.monotonic() - started, found, counts)
