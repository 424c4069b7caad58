"""A search's worth of tasks, small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.search_scale import SHAPES

ROOT = Path(__file__).parents[2]


def test_shapes_have_as_many_tasks_as_they_say_and_jobs_share_most() -> None:
    (flat,) = SHAPES["flat"](1000)
    assert len({node.id for node in flat}) == len(flat) == 1001
    jobs = list(SHAPES["jobs"](1000))
    assert [len(nodes) for nodes in jobs] == [50] * 20
    assert all(len(nodes[-1].sources()) == 49 for nodes in jobs)
    assert len({node.id for nodes in jobs for node in nodes}) == 2 * 40 + 20 * 10


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_are_run_once_and_measured(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    words = ("--tasks", "500", "--workers", "2", "--databases", "sqlite", "--finished", "0", "1000", "--shapes", "jobs")
    command = [sys.executable, "-m", "benchmarks.search_scale", *words, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    cases = json.loads(out.read_text())["cases"]
    assert [(case["tasks_of_jobs"], case["tasks_run"], case["finished_before"]) for case in cases] == [
        (500, 140, 0),
        (500, 140, 1000),
    ]
    assert all(case["rate"] > 0 and case["cpu_ms_a_task"]["orchestrator"] > 0 for case in cases)
