"""The first level: one schedule on one database, with schedulers as threads; a second or two each."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.member import silent_deaths
from tests.faults.outcome import Outcome, judge, settle
from tests.faults.schedule import HAVE, Schedule
from tests.faults.world import World


def run(schedule: Schedule, url: str, folder: Path, having: frozenset[str] = HAVE) -> Outcome:
    """Disturb a service as scheduled, let it come to its end, and judge what happened.

    Parameters
    ----------
    url
        A database that has the schema, is watched (`recorder.install`), and has no rows.
    folder
        An empty folder for the store.
    having
        What the service has of that some faults need.
    """
    started = time.monotonic()
    with silent_deaths():
        world = World(url, folder, random.Random(f"world {schedule.seed}"), schedule.schedulers)
        try:
            with world.own_clock():
                for step in schedule.steps:
                    time.sleep(step.after)
                    step.fault.apply(world)
                    world.look()
                world.calm()
            world.wait_for_jobs()
            world.replace_members()
            settle(world)
            found, counts = judge(world, schedule, having)
            counts |= {"hooks_sprung": sum(member.sprung for member in world.members)}
        finally:
            world.close()
    backend = "postgres" if world.postgres else "sqlite"
    return Outcome(schedule, backend, time.monotonic() - started, found, counts)
