"""Schedules of random faults against real schedulers on both databases; the long form is `make soak`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS
from tests.faults.graphs import ARTIFACT, BLOB, GRAPHS, undisturbed
from tests.faults.level1 import run
from tests.faults.recorder import install
from tests.faults.schedule import HAVE, draw

SEEDS = range(1, 4)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_lose_nothing_and_repeat_nothing(
    seed: int, backend: str, database_url: str, tmp_path: Path
) -> None:
    install(database_url)
    schedule = draw(seed, postgres=backend == "postgres")
    sys.stdout.write(f"seed {seed} on {backend}\n{json.dumps(schedule.document())}\n")
    outcome = run(schedule, database_url, tmp_path)
    assert outcome.violations == {}
    assert outcome.figures["finished"] > 0


def test_schedule_is_drawn_again_by_its_seed() -> None:
    first = draw(7, postgres=True)
    assert draw(7, postgres=True) == first
    assert draw(8, postgres=True).steps != first.steps


def test_every_fault_is_drawn_where_it_applies() -> None:
    def kinds(**where: bool | frozenset[str]) -> set[type]:
        return {type(step.fault) for seed in range(200) for step in draw(seed, **where).steps}

    assert kinds(postgres=True, having=HAVE) == set(FAULTS)
    assert kinds(postgres=True, having=frozenset()) == {kind for kind in FAULTS if not kind.needs}
    assert kinds(postgres=False) == {kind for kind in FAULTS if not kind.postgres_only}


def test_graphs_share_tasks_and_keys() -> None:
    grid, twin, part, *_ = GRAPHS
    ids = [{node.id for node in graph.nodes} for graph in (grid, twin, part)]
    assert len(ids[0] & ids[2]) == 6
    assert not ids[0] & ids[1]
    keys = [set(undisturbed(graph)[0]) for graph in (grid, twin)]
    # All but the first row, whose tasks wait for other times and give the same.
    assert len(keys[0] & keys[1]) == 7
    assert set(undisturbed(grid)[1]) == {ARTIFACT}
    assert set(undisturbed(part)[1]) == {BLOB}
