"""The second level: one schedule on real processes; half a minute or more each."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.cluster import Cluster, Servers
from tests.faults.outcome import Outcome, judge, settle
from tests.faults.schedule import HAVE, Schedule


def run(servers: Servers, schedule: Schedule, url: str, folder: Path, having: frozenset[str] = HAVE) -> Outcome:
    """Disturb a cluster as scheduled, let it come to its end, and judge what happened; see `level1.run`.

    Parameters
    ----------
    servers
        Shared by schedules, and whole again at the end of each.
    url
        A database of the servers' Postgres.
    """
    started = time.monotonic()
    cluster = Cluster(servers, url, folder, random.Random(f"world {schedule.seed}"), min(2, schedule.schedulers))
    try:
        for step in schedule.steps:
            time.sleep(step.after)
            step.fault.apply(cluster)
        cluster.calm()
        settle(cluster)
        found, counts = judge(cluster, schedule, having)
        notes = cluster.last_words()
    finally:
        cluster.close()
    return Outcome(schedule, "cluster", time.monotonic() - started, found, counts, notes)
