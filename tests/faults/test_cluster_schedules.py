"""A few schedules against real processes; the long form is `make soak LEVEL=2`."""

from __future__ import annotations

import time

import pytest

from tests.faults.cluster_faults import CLUSTER_FAULTS
from tests.faults.many import Plan, run_cluster
from tests.faults.schedule import HAVE

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_random_faults_of_processes_lose_nothing_and_repeat_nothing() -> None:
    found = run_cluster(Plan(level=2), range(1, 4), time.time() + 1200)
    assert [each.get("violations") for each in found] == [None] * len(found)
    assert sum(each["figures"]["finished"] for each in found) > 0


def test_every_fault_of_processes_is_drawn() -> None:
    plan = Plan(level=2, having=HAVE)
    drawn = {type(step.fault) for seed in range(200) for step in plan.draw(seed, "cluster").steps}
    assert drawn == set(CLUSTER_FAULTS)
